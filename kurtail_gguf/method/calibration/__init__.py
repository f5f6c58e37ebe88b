"""What rotations are learned from: texts, token batches, text of the model's own, captured activations."""
