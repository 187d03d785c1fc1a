"""Encoders that are timm's, the masked autoencoder around one, and the heads of distillation and fine-tuning.

Nothing here knows a rank, a device, a file or a random generator: noise is an argument. The modules are imported one by
one (``foveal.models.patches`` needs torch alone), so that what does not build a model does not wait for timm.
"""
