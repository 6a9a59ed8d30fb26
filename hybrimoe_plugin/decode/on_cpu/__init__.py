"""Decode steps of layers on the CPU."""
