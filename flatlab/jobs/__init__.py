"""Missing work as ordered jobs, and the processes that run them."""
