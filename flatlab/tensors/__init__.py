"""Torch without a landscape: flat vectors, nested batches, memory, losses, BatchNorm statistics."""
