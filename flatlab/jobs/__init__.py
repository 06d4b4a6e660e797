"""What is missing, as ordered jobs, and the processes that do them."""
