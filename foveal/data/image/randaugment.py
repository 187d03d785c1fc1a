"""RandAugment (Cubuk et al., 2020) with timm's increasing ranges, as MAE fine-tunes with; its draws are arguments.

What strengthens with the magnitude does so for every operation (timm's ``inc1``); an operation that is drawn is done
with a probability of a half, as there. What a change of shape leaves bare is grey.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.data.config import AugmentConfig

_CHANCE, _WHICH, _SIGN, _FIRST, _SECOND = range(5)
UNIFORMS_PER_OP = 5  # uniform numbers that one operation takes
_APPLY_PROB = 0.5
_FILL_VALUE = 128.0


def rand_augment(image: np.ndarray, uniforms: np.ndarray, augment: AugmentConfig) -> np.ndarray:
    """An image uint8 [C, H, W] after ``augment.operations`` random changes; ``numbers`` is float32 [operations, COLUMNS]."""
    seen = torch.from_numpy(image)
    for row in uniforms.astype(float):
        if row[_CHANCE] >= _APPLY_PROB:
            continue
        # Box and Muller, 1958; 1 - u keeps the logarithm finite.
        normal = math.sqrt(-2 * math.log(1 - row[_FIRST])) * math.cos(2 * math.pi * row[_SECOND])
        strength = min(max(augment.magnitude + augment.magnitude_std * normal, 0.0), 10.0) / 10
        change = _OPERATIONS[int(row[_WHICH] * len(_OPERATIONS))]
        seen = change(seen, strength, strength if row[_SIGN] < 0.5 else -strength)
    return seen.numpy()


def _affine_transform(
    image: Tensor,
    angle: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
    center: list[float] | None = None,
) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode, functional  # torchvision takes a second, few sets need it

    how: Any = {"scale": 1.0, "interpolation": InterpolationMode.BILINEAR, "fill": [_FILL_VALUE], "center": center}
    return functional.affine(image, angle=angle, translate=list(shift), shear=list(shear), **how)


def _shear(image: Tensor, across: float, down: float) -> Tensor:
    """From the upper left corner, as Pillow does it."""
    degrees = (math.degrees(math.atan(across)), math.degrees(math.atan(down)))
    return _affine_transform(image, shear=degrees, center=[0.0, 0.0])


def _color_adjustment(name: str) -> Callable[[Tensor, float, float], Tensor]:
    def change(image: Tensor, _strength: float, signed: float) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, f"adjust_{name}")(image, max(0.1, 1 + 0.9 * signed))

    return change


def _unary_operation(name: str) -> Callable[[Tensor, float, float], Tensor]:
    def change(image: Tensor, _strength: float, _signed: float) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, name)(image)

    return change


def _posterize(image: Tensor, strength: float, _signed: float) -> Tensor:
    kept = 4 - int(strength * 4)  # bits
    return image & (0xFF << (8 - kept) & 0xFF)


def _solarize(image: Tensor, strength: float, _signed: float) -> Tensor:
    return torch.where(image >= 256 - int(strength * 256), 255 - image, image)


def _solarize_add(image: Tensor, strength: float, _signed: float) -> Tensor:
    """timm's SolarizeAdd: what is dark becomes lighter."""
    return torch.where(image < 128, (image.int() + int(strength * 110)).clamp(max=255).to(torch.uint8), image)


_OPERATIONS: tuple[Callable[[Tensor, float, float], Tensor], ...] = (
    _unary_operation("autocontrast"),
    _unary_operation("equalize"),
    _unary_operation("invert"),
    lambda image, _, signed: _affine_transform(image, angle=-30 * signed),
    _posterize,
    _solarize,
    _solarize_add,
    _color_adjustment("saturation"),
    _color_adjustment("contrast"),
    _color_adjustment("brightness"),
    _color_adjustment("sharpness"),
    lambda image, _, signed: _shear(image, 0.3 * signed, 0.0),
    lambda image, _, signed: _shear(image, 0.0, 0.3 * signed),
    lambda image, _, signed: _affine_transform(image, shift=(-0.45 * signed * image.shape[2], 0.0)),
    lambda image, _, signed: _affine_transform(image, shift=(0.0, -0.45 * signed * image.shape[1])),
)
