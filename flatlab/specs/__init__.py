"""Specifications of runs and measurements, as frozen records. Torch-free."""
