"""A module for each metric: `fill(probe, run, place, report)` measures, and writes the probe's result."""
