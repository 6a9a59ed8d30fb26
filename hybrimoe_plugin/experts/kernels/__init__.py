"""What computes experts in slots: fused Triton kernels, and their plain twin in torch
operations.
"""
