"""How a frozen layer is adapted: bases, ops, adapters, stacks, groups."""
