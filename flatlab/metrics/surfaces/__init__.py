"""The loss on lines and planes."""
