"""Training: one visible loop, and the parts that are handed to it."""
