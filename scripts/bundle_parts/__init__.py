"""Parts of `scripts/gpu_bundle.py`: packages, compiled kernels, the classic host, and their use."""
