"""Weights to 4-bit codes: arrays in, codes and scales out. A method is a file of its own."""
