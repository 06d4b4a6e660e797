"""Quantizers: LSQ, INQ, OBC and rounding; where they are attached, how they are baked and packed."""
