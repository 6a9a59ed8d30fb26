"""KV caches of token prefixes, kept for prompts that begin with the same tokens."""
