"""Sentences in named domains: read, cut into word pieces of the source domains, handed out as numbers."""
