"""What `hybrimoe doctor` checks: packages, backends, memory, and files kept on disk."""
