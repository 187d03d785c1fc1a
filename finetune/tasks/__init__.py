"""What the kind of a label makes of fine-tuning: model, objective, metrics, head."""
