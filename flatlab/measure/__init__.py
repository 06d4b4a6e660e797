"""A module for each metric: `fill(measurement, run, place, report)` measures, and writes the measurement's result."""
