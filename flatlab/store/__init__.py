"""Where runs and measurements lie: directories named by digests, without torch."""
