"""Cases for the device kernels: shapes, random weights and reference results."""
