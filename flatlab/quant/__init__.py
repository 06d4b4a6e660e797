"""Quantizers: learned step sizes (LSQ), where they are attached, and how they are baked into plain weights."""
