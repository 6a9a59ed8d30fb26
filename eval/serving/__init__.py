"""Servers under load: ours and llama.cpp's."""
