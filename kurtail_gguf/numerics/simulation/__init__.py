"""What the runtime rounds and rotates while it computes, in torch: for calibration on it and to check it."""
