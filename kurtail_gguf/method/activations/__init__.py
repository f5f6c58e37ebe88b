"""Which block linears get 8-bit activations: what rounding their inputs costs, and the choice under a budget."""
