"""Fine-tuning tasks, selected by the label kind: model, objective, metrics, head card."""
