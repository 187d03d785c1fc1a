"""foveal: pretraining of vision transformers with a loss curve that is independent of hardware and restarts."""

__version__ = "0.2.0"
