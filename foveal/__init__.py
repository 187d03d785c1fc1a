"""foveal: self-supervised pretraining of vision transformers whose loss curve does not know how it was run."""

__version__ = "0.1.0"
