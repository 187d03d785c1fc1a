"""Regularization of fine-tuning: mixup, cutmix and erasing, adversarial examples, a teacher."""
