"""Which parts of a target an accelerator computes: costs, the choice, and what serves it."""
