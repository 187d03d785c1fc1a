"""Stage 1, pretraining a masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021)."""
