"""Torch without a landscape: flat vectors, nested batches, memory, derivatives, losses."""
