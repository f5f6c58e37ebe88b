"""Finding R1 and R2: random orthogonal and Hadamard matrices, objectives, optimisation, storage."""
