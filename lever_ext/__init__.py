"""Speculative decoding for a target model that lives on flash: the sibling of HybriMoE on the same injection mechanism."""
