"""Pure policies: what to compute where, what to keep, what to fetch ahead. No torch, no devices, no
models.
"""
