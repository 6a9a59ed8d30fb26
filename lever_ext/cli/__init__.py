"""The parts of the `hybrimoe` command that need lever_ext; the command finds them by name."""
