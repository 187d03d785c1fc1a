"""What makes fine-tuning harder on purpose: mixing, adversarial images, a teacher."""
