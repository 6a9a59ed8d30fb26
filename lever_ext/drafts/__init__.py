"""Drafts behind one protocol: a language model in DRAM, a low-bit copy of the target, prompt-lookup
n-grams.
"""
