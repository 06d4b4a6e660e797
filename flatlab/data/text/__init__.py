"""Sentences in named domains: read, cut into word pieces of the source domains, returned as token ids."""
