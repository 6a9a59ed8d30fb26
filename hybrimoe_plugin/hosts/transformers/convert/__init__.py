"""Quantised checkpoints written as GGUF files, in the GGML types nearest to theirs."""
