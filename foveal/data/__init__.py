"""From tar shards to batches, in an order that is arithmetic."""

from foveal.data.batch import Batch
from foveal.data.config import AugmentConfig, DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import eval_batches, order_of, train_batches
from foveal.data.transforms import normalise

__all__ = ["AugmentConfig", "Batch", "DataConfig", "Dataset", "eval_batches", "normalise", "order_of", "train_batches"]
