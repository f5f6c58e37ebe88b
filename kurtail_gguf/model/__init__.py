"""What a model is: sizes and names, what its layers' linears read, and one decoder layer that runs."""
