"""Speculative decoding with a target that lives on flash: the sibling of HybriMoE on the same injection mechanism."""
