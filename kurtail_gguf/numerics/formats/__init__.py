"""The file's numeric formats in numpy: what the C reference must agree with bit for bit."""
