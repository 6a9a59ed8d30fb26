"""Packaged rules files."""
