"""The engine as it works, for whoever watches: places of experts, busy lanes, rates."""
