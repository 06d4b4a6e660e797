"""What is asked for, as frozen records without torch."""
