"""Norm gains and rotations into weights, in float64: the model computes the same function after it."""
