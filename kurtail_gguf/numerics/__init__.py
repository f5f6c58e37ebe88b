"""Numbers as files and runtime have them: formats of blocks, Hadamard matrices, rounding."""
