"""The `hybrimoe` command: one module per sub-command, imported only when it is called."""
