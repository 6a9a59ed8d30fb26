"""`python -m eval.cuda_model`: whole models on one NVIDIA GPU, with and without CUDA graphs."""
