"""Products of a loss's second derivatives with vectors, and what torch needs for them to be right."""
