"""Flatness: the rise of the loss around a checkpoint."""
