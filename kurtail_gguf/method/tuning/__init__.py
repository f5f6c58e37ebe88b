"""After quantization: what is still free in the file, learned end to end from the unquantized model."""
