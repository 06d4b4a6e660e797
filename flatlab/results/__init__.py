"""Results of measurements, with NumPy alone."""
