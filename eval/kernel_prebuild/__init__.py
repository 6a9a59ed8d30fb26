"""`python -m eval.kernel_prebuild`: compile the device kernels on a machine without a GPU."""
