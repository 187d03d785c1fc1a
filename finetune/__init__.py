"""Fine-tuning, the third stage: train or probe an encoder on labelled data."""
