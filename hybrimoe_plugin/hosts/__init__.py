"""The model libraries that carry injected operators."""
