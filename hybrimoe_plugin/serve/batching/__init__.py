"""Many answers from one model: which pass comes next, and who is in it."""
