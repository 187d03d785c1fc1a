"""Any image model of timm, as it is: convolutional networks and hierarchical transformers beside foveal's encoders.

B images, D numbers of a feature, L places on the last feature map, rows by columns.
"""

import difflib
import functools
import inspect
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from foveal.config import Config, ImageSize, height_and_width, science
from foveal.errors import ConfigError, ExportError
from foveal.models.droppath import sample_drops
from foveal.models.vit import EncoderCard


class BackboneCard(Config):
    """What it takes to build a model of timm again."""

    timm: str = science(about="timm's name")
    image_size: ImageSize = science(about="pixels of its images: the side, or [height, width]")
    channels: int = science(about="channels of its images", ge=1)
    classes: int = science(0, "outputs of its head; 0: it has none", ge=0)


def build_backbone(
    name: str, *, image_size: int | tuple[int, int], channels: int, classes: int = 0, drop_path: float = 0.0
) -> nn.Module:
    """timm's model of a name on the CPU in float32, freshly initialised as timm does, without dropout.

    ``classes`` are the outputs of its head; 0: none. Drop path takes its draws from ``foveal.models.droppath.set_drops``.
    The weights are drawn from torch's global generator: ``torch.manual_seed`` before this call makes them a function of
    the seed and of timm's version.
    Errors: ConfigError for a name that timm does not have, and for sizes or a drop path that the model cannot have.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "See timm.list_models()."
        raise ConfigError(f"'{name}' is not a model of timm {timm.__version__}. {hint}")
    takes = _arguments(name)
    given: dict[str, Any] = {"in_chans": channels, "num_classes": classes, "drop_path_rate": drop_path}
    given |= {"img_size": height_and_width(image_size)}
    if drop_path and "drop_path_rate" not in takes:
        raise ConfigError(f"'{name}' has no drop path; drop_path={drop_path:g} cannot be")
    try:
        backbone = timm.create_model(name, pretrained=False, **{k: v for k, v in given.items() if k in takes})
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        sentence = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"timm cannot build '{name}' for images of {_times(image_size)} pixels with {channels} channels: {sentence}"
        ) from None
    sample_drops(backbone)
    return backbone


def backbone_card(name: str, image_size: int | tuple[int, int], channels: int, classes: int = 0) -> dict[str, Any]:
    """Plain data, ready for JSON, from which ``backbone_from_card`` builds the same model."""
    return BackboneCard(timm=name, image_size=image_size, channels=channels, classes=classes).tree()


def card_of(card: dict[str, Any], where: str) -> EncoderCard | BackboneCard:
    """What an export's card says of its model: an encoder of foveal's, or a model of timm. Errors: ConfigError."""
    return (BackboneCard if "timm" in card else EncoderCard).checked(card, where)


def backbone_from_card(
    card: dict[str, Any], where: str, *, drop_path: float = 0.0, classes: int | None = None
) -> nn.Module:
    """A model like the one a card was made for, freshly initialised; the classes may be others. Errors: ExportError."""
    try:
        told = BackboneCard.checked(card, where)
        size = {"image_size": told.image_size, "channels": told.channels}
        return build_backbone(
            told.timm, **size, classes=told.classes if classes is None else classes, drop_path=drop_path
        )
    except ConfigError as error:
        sentence = str(error)
        raise ExportError(sentence if sentence.startswith(where) else f"{where}: {sentence}") from None


def whole_and_map(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a model of timm makes of normalised images [B, C, H, W] before its head: (pooled [B, D], last map [B, D, rows, columns]).

    A transformer's patches are laid out as the grid that they came from.
    """
    last = backbone.forward_features(images)
    pooled = backbone.forward_head(last, pre_logits=True)
    if last.ndim == 3:
        rows, columns = backbone.patch_embed.grid_size
        return pooled, last[:, backbone.num_prefix_tokens :].transpose(1, 2).unflatten(2, (rows, columns))
    return pooled, last.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else last


def whole_and_places(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """As ``whole_and_map``, with the map's places in a row: (pooled [B, D], places [B, L, D])."""
    pooled, last = whole_and_map(backbone, images)
    return pooled, last.flatten(2).transpose(1, 2)


@functools.cache
def shapes_of(name: str, image_size: int | tuple[int, int], channels: int) -> tuple[int, tuple[int, int, int]]:
    """The width of a model's pooled feature, and the (D, rows, columns) of its last map, found without memory.

    Errors: ConfigError, as ``build_backbone``, and for a model that has no such map of images of this size.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(name, image_size=image_size, channels=channels).eval()
        try:
            pooled, last = whole_and_map(backbone, torch.empty(2, channels, *height_and_width(image_size)))
        except (ArithmeticError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            sentence = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"'{name}' makes no feature map of images of {_times(image_size)} pixels: {sentence}"
            ) from None
    width, rows, columns = last.shape[1:]
    return pooled.shape[1], (width, rows, columns)


def depends_on_others(model: nn.Module) -> bool:
    """Whether a sample's forward depends on the others of its micro on its rank, as under BatchNorm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())  # noqa: SLF001


def has_distillation_token(model: nn.Module) -> bool:
    """Whether a model has a token, and a head on it, that learn from a teacher (Touvron et al., "DeiT", 2021)."""
    return isinstance(model, VisionTransformerDistilled)


def _arguments(name: str) -> set[str]:
    """What timm passes on to a model of this name."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        kind = type(timm.create_model(name, pretrained=False))
    return {name for each in kind.__mro__ for name in inspect.signature(each.__init__).parameters}


def _times(image_size: int | tuple[int, int]) -> str:
    return " x ".join(map(str, height_and_width(image_size)))
