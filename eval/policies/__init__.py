"""The systems that are compared, the routing that they are compared on, and cache hit rates."""
