"""`python -m eval.cuda`: the MoE layers of several systems on one NVIDIA GPU."""
