"""`python -m eval.lever`: speculative decoding policies for a target on flash."""
