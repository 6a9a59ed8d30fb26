"""What is around every request, and the process that answers them."""
