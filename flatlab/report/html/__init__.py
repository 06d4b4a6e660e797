"""Runs and saved results as one HTML page that needs no network."""
