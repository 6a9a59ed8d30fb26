"""What is decided about a model before a weight is read: its rules' plan, and where memory goes."""
