"""`python -m eval.kernels`: what the device kernels compile to, counted without a GPU."""
