"""Images of a model's inputs, targets and predictions."""
