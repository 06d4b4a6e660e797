"""The store of runs and measurements: directories named by digests. Torch-free."""
