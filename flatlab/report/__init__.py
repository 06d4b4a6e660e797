"""Results of runs as tidy frames and pictures, without torch."""
