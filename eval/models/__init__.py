"""Synthetic models: shapes, routing, random weights and model files."""
