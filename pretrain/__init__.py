"""The first stage: a masked autoencoder learns to see (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021)."""
