"""The command `hybrimoe serve`."""
