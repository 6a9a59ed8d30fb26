"""Other inference engines to compare with, and the memory roofline."""
