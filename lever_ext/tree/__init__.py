"""Token trees, what a tree is worth and what it costs: pure Python and numpy, no torch."""
