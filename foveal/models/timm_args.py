"""The arguments with which timm builds one of its models: those that the model's constructors take."""

import difflib
import functools
import inspect
from typing import Any

import timm
import torch

from foveal.config import height_and_width
from foveal.errors import ConfigError


def check_timm_name(name: str) -> None:
    """Raise ConfigError with the nearest names if timm has no model of this name."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "See timm.list_models()."
        raise ConfigError(f"'{name}' is not a model of timm {timm.__version__}. {hint}")


@functools.cache
def constructor_parameters(name: str) -> frozenset[str]:
    """Return the parameters of the constructors of a model's class and its bases."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model_class = type(timm.create_model(name, pretrained=False))
    return frozenset(name for base in model_class.__mro__ for name in inspect.signature(base.__init__).parameters)


def timm_backbone_args(name: str, image_size: int | tuple[int, int], channels: int, num_classes: int) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model``, beside the name, for a model of timm as it is; JSON holds them.

    Raises: ConfigError if timm has no such name.
    """
    check_timm_name(name)
    args = {"in_chans": channels, "num_classes": num_classes, "img_size": height_and_width(image_size)}
    return {key: value for key, value in args.items() if key in constructor_parameters(name)}
