"""Early exit: drop unlikely tree nodes in the middle of the target pass (paper 2b)."""
