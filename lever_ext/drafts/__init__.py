"""Drafts behind one protocol: a small model, a low-bit copy of the target, prompt lookup."""
