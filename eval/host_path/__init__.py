"""What decoding on a GPU costs the host, measured without a GPU."""
