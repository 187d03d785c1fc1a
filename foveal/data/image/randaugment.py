"""RandAugment (Cubuk et al., 2020) with timm's increasing ranges, as in MAE's fine-tuning.

Random numbers are arguments. Every operation becomes stronger with the magnitude (timm's ``inc1``); a drawn operation
is applied with probability 0.5, as in timm. Geometric operations are Pillow's, as timm's are, with the interpolation of
the crop and with the pixel mean in uncovered pixels. Runs before data.decode_version=2 keep torchvision's, bilinear with
grey.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveal.data.config import DataConfig

_APPLY, _OPERATION, _SIGN, _NORMAL_1, _NORMAL_2 = range(5)  # columns of the uniform numbers
UNIFORMS_PER_OP = 5  # uniform numbers per operation
_APPLY_PROB = 0.5
_GREY = 128.0


class Warp(Protocol):
    """A geometric operation on an image uint8 [C, H, W]: rotation or shear or shift, in the convention of Pillow.

    ``degrees`` is counterclockwise around the centre. ``shear`` and ``shift`` are (x, y): the output at (x, y) is the
    input at (x + shear_x * y + shift_x, y + shear_y * x + shift_y), in pixels.
    """

    def __call__(
        self,
        image: Tensor,
        *,
        degrees: float = 0.0,
        shear: tuple[float, float] = (0.0, 0.0),
        shift: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        """Return the image warped, with the same shape."""
        ...


def rand_augment(image: np.ndarray, uniforms: np.ndarray, cfg: DataConfig, mean: Sequence[float]) -> np.ndarray:
    """Apply random operations to an image uint8 [C, H, W], as ``cfg.augment.rand_augment`` says.

    ``uniforms`` is float32 [ops, UNIFORMS_PER_OP]; ``mean`` is the pixel mean per channel, in [0, 1].
    """
    settings = cfg.augment.rand_augment
    warp = _PillowWarp(cfg.augment.interpolation, mean) if cfg.decode_version > 1 else _warp_bilinear_on_grey
    augmented = torch.from_numpy(image)
    for row in uniforms.astype(float):
        if row[_APPLY] >= _APPLY_PROB:
            continue
        # Box and Muller, 1958; 1 - u keeps the logarithm finite.
        normal = math.sqrt(-2 * math.log(1 - row[_NORMAL_1])) * math.cos(2 * math.pi * row[_NORMAL_2])
        strength = min(max(settings.magnitude + settings.magnitude_std * normal, 0.0), 10.0) / 10
        operation = _OPERATIONS[int(row[_OPERATION] * len(_OPERATIONS))]
        augmented = operation(augmented, strength, strength if row[_SIGN] < 0.5 else -strength, warp)
    return augmented.numpy()


# (image uint8 [C, H, W], strength in [0, 1], the same with a sign, the geometric operation) -> image
_Operation = Callable[[Tensor, float, float, Warp], Tensor]


class _PillowWarp:
    """Pillow's geometric operations, with an interpolation and the mean colour in uncovered pixels."""

    def __init__(self, interpolation: str, mean: Sequence[float]) -> None:
        self._resample = Image.Resampling[interpolation.upper()]
        fill = tuple(min(255, round(255 * value)) for value in mean)  # rounded as timm does
        self._fill = fill[0] if len(fill) == 1 else fill

    def __call__(
        self,
        image: Tensor,
        *,
        degrees: float = 0.0,
        shear: tuple[float, float] = (0.0, 0.0),
        shift: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        if degrees:
            warped = picture.rotate(degrees, self._resample, fillcolor=self._fill)
        else:
            matrix = (1, shear[0], shift[0], shear[1], 1, shift[1])
            warped = picture.transform(
                picture.size, Image.Transform.AFFINE, matrix, self._resample, fillcolor=self._fill
            )
        return torch.from_numpy(np.array(warped)).reshape(*image.shape[1:], -1).permute(2, 0, 1).contiguous()


def _warp_bilinear_on_grey(
    image: Tensor,
    *,
    degrees: float = 0.0,
    shear: tuple[float, float] = (0.0, 0.0),
    shift: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    # Imported here: torchvision takes a second to import, and few runs use RandAugment.
    from torchvision.transforms.v2 import InterpolationMode, functional

    return functional.affine(
        image,
        angle=-degrees,
        translate=[-pixels for pixels in shift],
        scale=1.0,
        shear=[math.degrees(math.atan(factor)) for factor in shear],
        interpolation=InterpolationMode.BILINEAR,
        fill=[_GREY],
        center=[0.0, 0.0] if any(shear) else None,  # Pillow shears around the upper left corner
    )


def _color_adjustment(name: str) -> _Operation:
    def apply(image: Tensor, _strength: float, signed: float, _warp: Warp) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, f"adjust_{name}")(image, max(0.1, 1 + 0.9 * signed))

    return apply


def _unary_operation(name: str) -> _Operation:
    def apply(image: Tensor, _strength: float, _signed: float, _warp: Warp) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, name)(image)

    return apply


def _posterize(image: Tensor, strength: float, _signed: float, _warp: Warp) -> Tensor:
    num_bits = 4 - int(strength * 4)
    return image & (0xFF << (8 - num_bits) & 0xFF)


def _solarize(image: Tensor, strength: float, _signed: float, _warp: Warp) -> Tensor:
    return torch.where(image >= 256 - int(strength * 256), 255 - image, image)


def _solarize_add(image: Tensor, strength: float, _signed: float, _warp: Warp) -> Tensor:
    """Lighten pixels below 128 (timm's SolarizeAdd)."""
    return torch.where(image < 128, (image.int() + int(strength * 110)).clamp(max=255).to(torch.uint8), image)


_OPERATIONS: tuple[_Operation, ...] = (
    _unary_operation("autocontrast"),
    _unary_operation("equalize"),
    _unary_operation("invert"),
    lambda image, _, signed, warp: warp(image, degrees=30 * signed),
    _posterize,
    _solarize,
    _solarize_add,
    _color_adjustment("saturation"),
    _color_adjustment("contrast"),
    _color_adjustment("brightness"),
    _color_adjustment("sharpness"),
    lambda image, _, signed, warp: warp(image, shear=(0.3 * signed, 0.0)),
    lambda image, _, signed, warp: warp(image, shear=(0.0, 0.3 * signed)),
    lambda image, _, signed, warp: warp(image, shift=(0.45 * signed * image.shape[2], 0.0)),
    lambda image, _, signed, warp: warp(image, shift=(0.0, 0.45 * signed * image.shape[1])),
)
