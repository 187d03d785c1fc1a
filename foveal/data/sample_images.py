"""A few images of a split, always the same ones, for pictures."""

from collections.abc import Sequence

import numpy as np
import torch

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import UndecodableError, decode_crop
from foveal.data.image.transforms import CropBox, compute_eval_crop
from foveal.data.sampling.sources import SampleSource, find_image_member
from foveal.data.sampling.subset import SplitSubset


def read_sample_images(
    dataset: Dataset, cfg: DataConfig, split: str, max_images: int, label_field: str | None = None
) -> Batch:
    """Return centre crops of images spread over the first shard of a split; those that do not decode are left out.

    They are the images of epoch 0 with their ids, so that masks keyed by the sample are always the same too.
    Of a remote shard only the images are read. ``label_field``: the member that is the label, never the image. Raises: DataError if shard or index is unreadable.
    """
    first_shard = dataset.samples_per_shard(split)[0]
    ids = np.unique(np.linspace(0, first_shard - 1, max_images).round().astype(int))
    return read_images_by_id(dataset, cfg, split, ids.tolist(), label_field)


def read_images_by_id(
    dataset: Dataset, cfg: DataConfig, split: str, sample_ids: Sequence[int], label_field: str | None = None
) -> Batch:
    """Return centre crops of samples of a split, as evaluation sees them; those that do not decode are left out.

    ``label_field``: the member that is the label, never the image. Raises: DataError if shard or index is unreadable.
    """
    source = SampleSource(dataset, split, SplitSubset(dataset.samples_per_shard(split), None))
    images, ids = [], []

    def choose_crop(width: int, height: int) -> tuple[CropBox, bool]:
        return compute_eval_crop(width, height, cfg.eval_crop_ratio, cfg.eval_image_hw), False

    for sample_id in sample_ids:
        location = source.locate_sample(sample_id)
        member = find_image_member(location, label_field, cfg.decode_version)
        data = dataset.read_range(location.shard_index.shard, *member)
        try:
            image = decode_crop(
                data,
                cfg.channels,
                choose_crop,
                cfg.eval_image_hw,
                cfg.augment.interpolation,
                cfg.jpeg_scaling,
                cfg.decode_version,
                dataset.manifest.bit_depth,
            )
        except UndecodableError:
            continue
        images.append(torch.from_numpy(image))
        ids.append(sample_id)
    pixels = torch.stack(images) if images else torch.empty(0, cfg.channels, *cfg.eval_image_hw, dtype=torch.uint8)
    keys = torch.tensor(ids, dtype=torch.int64)
    return Batch(pixels, torch.full_like(keys, -1), keys, keys, keys >= 0, step=0, epoch=0, microbatch_index=0)
