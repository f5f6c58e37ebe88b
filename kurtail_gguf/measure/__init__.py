"""How good a GGUF file is: measured by the shipped runtime, and written down in cards and reports."""
