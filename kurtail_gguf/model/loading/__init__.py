"""Getting at a model: streaming checkpoints, and what turns MODEL into an HF directory."""
