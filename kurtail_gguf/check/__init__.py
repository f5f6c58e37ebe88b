"""Whether a file is what the model became, and whether the runtime computes what the simulation does."""
