"""Products of a loss's second derivatives with vectors, corrected where torch's are wrong."""
