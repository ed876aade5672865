"""Floor 0: immutable values that every room shares; no I/O, no imports from other rooms."""
