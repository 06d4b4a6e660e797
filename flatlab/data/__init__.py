"""Domains: named sets of images, their splits, and the batches cut from them."""
