"""Decode steps of a few sequences at once as CUDA graphs, for a few fixed numbers of them."""
