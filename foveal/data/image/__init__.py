"""Image decoding, cropping, augmentation, and the labels of a sample."""
