"""The real images on which an exported model is compared with foveal's. N images, C channels, H x W pixels."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foveal.data.image.decode import UndecodableError
from foveal.data.pack.image_tree import IMAGE_SUFFIXES
from foveal.errors import DataError
from foveal.inference.image_transform import ImageTransform

MAX_IMAGES = 4
_SAMPLES = ("china.jpg", "flower.jpg")  # photographs that come along with scikit-learn


@dataclass(frozen=True)
class ComparisonImages:
    """Image files, and the model's input of them before the normalisation: uint8 [N, C, H, W].

    ``pixels`` has ``MAX_IMAGES`` rows: after the files' own, their mirror images, then repetitions.
    """

    files: tuple[Path, ...]
    pixels: Tensor


def read_comparison_images(transform: ImageTransform, folder: Path | None) -> ComparisonImages:
    """Return the first images of a folder, or without one the photographs of scikit-learn; no network is used.

    Raises: DataError if the folder has no image that decodes.
    """
    files, rows = [], []
    for file in _list_samples() if folder is None else _list_files(folder):
        try:
            rows.append(transform.to_pixels(file))
        except (UndecodableError, OSError):
            continue
        files.append(file)
        if len(files) == MAX_IMAGES:
            break
    if not files:
        place = "scikit-learn" if folder is None else str(folder)
        raise DataError(f"{place} has no image that decodes; name a folder with images by --images")
    pixels = torch.stack(rows)
    pixels = torch.cat([pixels, pixels.flip(-1)])
    return ComparisonImages(tuple(files), pixels.repeat(-(-MAX_IMAGES // len(pixels)), 1, 1, 1)[:MAX_IMAGES])


def _list_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"--images {folder} is no folder")
    return sorted(file for file in folder.rglob("*") if file.suffix.lower()[1:] in IMAGE_SUFFIXES and file.is_file())


def _list_samples() -> list[Path]:
    spec = importlib.util.find_spec("sklearn")  # without its import, which takes a second
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return [Path(place) / "datasets" / "images" / name for place in places for name in _SAMPLES]
