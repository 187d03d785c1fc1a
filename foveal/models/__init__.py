"""Encoders built by timm, the masked autoencoder, and the heads of distillation and fine-tuning.

Nothing here depends on ranks, devices, files or random generators: noise is an argument. Import modules singly
(``foveal.models.patches`` needs only torch), so that code without a model does not wait for timm.
"""
