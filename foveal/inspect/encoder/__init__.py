"""Pictures of an encoder's inside: features, attention, activations."""
