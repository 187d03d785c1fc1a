"""Data pipeline: tar shards to batches, in a sample order computed from the seed and the step."""

from foveal.data.batch import Batch
from foveal.data.config import AugmentConfig, DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.transforms import normalise
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import TrainingSet, build_training_set, collect_mix_digests

__all__ = [
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "Dataset",
    "TrainingSet",
    "build_training_set",
    "collect_mix_digests",
    "eval_batches",
    "normalise",
    "train_batches",
]
