"""RandAugment (Cubuk et al., 2020) with timm's increasing ranges, as in MAE's fine-tuning.

Random numbers are arguments. Every operation becomes stronger with the magnitude (timm's ``inc1``); a drawn operation
is applied with probability 0.5, as in timm. Geometric operations fill uncovered pixels with grey.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from foveal.data.config import RandAugmentConfig

_APPLY, _OPERATION, _SIGN, _NORMAL_1, _NORMAL_2 = range(5)  # columns of the uniform numbers
UNIFORMS_PER_OP = 5  # uniform numbers per operation
_APPLY_PROB = 0.5
_FILL_VALUE = 128.0


def rand_augment(image: np.ndarray, uniforms: np.ndarray, cfg: RandAugmentConfig) -> np.ndarray:
    """Apply ``cfg.ops`` random operations to an image uint8 [C, H, W].

    ``uniforms`` is float32 [ops, UNIFORMS_PER_OP].
    """
    augmented = torch.from_numpy(image)
    for row in uniforms.astype(float):
        if row[_APPLY] >= _APPLY_PROB:
            continue
        # Box and Muller, 1958; 1 - u keeps the logarithm finite.
        normal = math.sqrt(-2 * math.log(1 - row[_NORMAL_1])) * math.cos(2 * math.pi * row[_NORMAL_2])
        strength = min(max(cfg.magnitude + cfg.magnitude_std * normal, 0.0), 10.0) / 10
        operation = _OPERATIONS[int(row[_OPERATION] * len(_OPERATIONS))]
        augmented = operation(augmented, strength, strength if row[_SIGN] < 0.5 else -strength)
    return augmented.numpy()


def _affine_transform(
    image: Tensor,
    angle: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
    center: list[float] | None = None,
) -> Tensor:
    # Imported here: torchvision takes a second to import, and few runs use RandAugment.
    from torchvision.transforms.v2 import InterpolationMode, functional

    return functional.affine(
        image,
        angle=angle,
        translate=list(shift),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=[_FILL_VALUE],
        center=center,
    )


def _shear(image: Tensor, x_shear: float, y_shear: float) -> Tensor:
    """Shear around the upper left corner, as Pillow does."""
    degrees = (math.degrees(math.atan(x_shear)), math.degrees(math.atan(y_shear)))
    return _affine_transform(image, shear=degrees, center=[0.0, 0.0])


def _color_adjustment(name: str) -> Callable[[Tensor, float, float], Tensor]:
    def apply(image: Tensor, _strength: float, signed: float) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, f"adjust_{name}")(image, max(0.1, 1 + 0.9 * signed))

    return apply


def _unary_operation(name: str) -> Callable[[Tensor, float, float], Tensor]:
    def apply(image: Tensor, _strength: float, _signed: float) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, name)(image)

    return apply


def _posterize(image: Tensor, strength: float, _signed: float) -> Tensor:
    num_bits = 4 - int(strength * 4)
    return image & (0xFF << (8 - num_bits) & 0xFF)


def _solarize(image: Tensor, strength: float, _signed: float) -> Tensor:
    return torch.where(image >= 256 - int(strength * 256), 255 - image, image)


def _solarize_add(image: Tensor, strength: float, _signed: float) -> Tensor:
    """Lighten pixels below 128 (timm's SolarizeAdd)."""
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
