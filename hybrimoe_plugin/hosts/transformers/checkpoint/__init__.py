"""Weights in a model directory's own safetensors files."""
