"""Quantizers (LSQ, INQ, OBC, rounding to the nearest level): attached to layers, baked into weights, packed as bits."""
