"""Whether an operator computes what the module that it is to replace computes."""
