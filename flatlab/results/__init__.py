"""What a measurement says, with NumPy alone."""
