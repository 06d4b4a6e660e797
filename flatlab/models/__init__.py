"""Networks by name, and checkpoints of other code bases."""
