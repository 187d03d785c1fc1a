"""Hugging Face's image processor with the steps of foveal's evaluation: shorter side, centre crop, normalisation.

Both crop the centre and resize with antialiasing. foveal crops a box of whole pixels and resizes that, a processor
resizes to a whole number of pixels and crops that, so that pixels differ by rounding; a JPEG that foveal decodes at
half its size or less differs by the decoder's filter too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from foveal.convert.files import import_extra, write_config
from foveal.convert.images import ComparisonImages
from foveal.errors import ExportError
from foveal.inference.image_transform import ImageTransform

ProcessFn = Callable[[Image.Image], Tensor]  # an upright image -> the model's input [C, H, W]
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


@dataclass(frozen=True)
class PixelDifference:
    """The difference of a processor's pixels and foveal's, in levels of 255.

    one_pixel: mean difference of foveal's own pixels from those one pixel further, in both axes. Rounding moves an image
    by less.
    """

    largest: float
    mean: float
    one_pixel: float


def write_image_processor(transform: ImageTransform, draft: Path, images: ComparisonImages) -> str:
    """Write ``preprocessor_config.json``, compare its pixels with foveal's; return a sentence about it.

    Raises: ExportError if the pixels differ by more than rounding.
    """
    height, width = transform.image_hw
    if height != width:
        return (
            "no image processor: transformers crops no largest centre of another shape than a square; foveal.load gives "
            "the transform"
        )
    write_config(draft / "preprocessor_config.json", build_processor_config(transform))
    difference = measure_pixels(open_processor(draft), transform, images)
    if not difference.mean <= difference.one_pixel:
        raise ExportError(
            f"transformers' image processor makes other pixels than foveal: they differ by {difference.mean:.1f} of 255 "
            f"levels on average, and a shift by one pixel by {difference.one_pixel:.1f}; nothing was written"
        )
    return describe_pixels("image processor", transform, difference)


def describe_pixels(name: str, transform: ImageTransform, difference: PixelDifference) -> str:
    """Return a sentence about the pixels of another library's transform."""
    gray = " of grayscale images (mode L)" if transform.channels == 1 else ""
    return (
        f"{name}: pixels{gray} differ from foveal's by {difference.mean:.2f} of 255 levels on average, by "
        f"{difference.largest:.0f} at most, because sizes are rounded elsewhere"
    )


def build_processor_config(transform: ImageTransform) -> dict[str, Any]:
    """Return the settings of transformers' ``BitImageProcessor`` for a square image."""
    side = transform.image_hw[0]
    # An even margin keeps the centre in its place; an odd one would move it by half a pixel.
    margin = 2 * round((side / transform.crop_ratio - side) / 2)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": transform.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": side + margin},
        "resample": _RESAMPLE[transform.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def open_processor(folder: Path) -> ProcessFn:
    """Return the image processor of a folder of transformers'."""
    processor = import_extra("transformers").AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def measure_pixels(process: ProcessFn, transform: ImageTransform, images: ComparisonImages) -> PixelDifference:
    """Return the difference of the pixels that ``process`` makes of image files. Raises: ExportError for another size."""
    std = 255 * torch.tensor(transform.std).view(-1, 1, 1)
    differences, shifted = [], []
    for file in images.files:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB" if transform.channels == 3 else "L")
        pixels, own = process(image), transform(file)
        if pixels.shape != own.shape:
            shapes = f"{list(pixels.shape)} of an image, foveal {list(own.shape)}"
            raise ExportError(f"the other library's image transform makes {shapes}; nothing was written")
        differences.append((pixels - own).abs() * std)
        shifted.append((own[:, 1:, 1:] - own[:, :-1, :-1]).abs() * std)
    levels = torch.stack(differences)
    return PixelDifference(levels.max().item(), levels.mean().item(), torch.stack(shifted).mean().item())
