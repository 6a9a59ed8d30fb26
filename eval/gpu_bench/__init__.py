"""MoE layers and bandwidths of one GPU, shared by the questions about GPUs."""
