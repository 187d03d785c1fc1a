"""Any image model of timm, as it is: convolutional networks and hierarchical transformers beside foveal's encoders.

B images, D numbers of a feature, L places on the last feature map, rows by columns.
"""

import difflib
import fnmatch
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.patch_embed import PatchEmbed
from timm.models._manipulate import group_parameters
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from foveal.config import Config, ImageSize, height_and_width, science
from foveal.errors import ConfigError, ExportError
from foveal.models.batch_norm import batch_norms, statistics_kept
from foveal.models.droppath import sample_drops
from foveal.models.vit import EncoderCard

# What timm's models raise for sizes that they cannot have.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)


class BackboneCard(Config):
    """What it takes to build a model of timm again."""

    timm: str = science(about="timm's name")
    image_size: ImageSize = science(about="pixels of its images: the side, or [height, width]")
    channels: int = science(about="channels of its images", ge=1)
    classes: int = science(0, "outputs of its head; 0: it has none", ge=0)

    @property
    def shape(self) -> tuple[str, int | tuple[int, int], int]:
        """What all but the head of it depends on: (timm's name, image size, channels)."""
        return self.timm, self.image_size, self.channels


def build_backbone(
    name: str, image_size: int | tuple[int, int], channels: int, *, classes: int = 0, drop_path: float = 0.0
) -> nn.Module:
    """timm's model of a name on the CPU in float32, freshly initialised as timm does, without dropout.

    ``classes`` are the outputs of its head; 0: none. Drop path takes its draws from ``foveal.models.droppath.set_drops``.
    The weights are drawn from torch's global generator: ``torch.manual_seed`` before this call makes them a function of
    the seed and of timm's version.
    Errors: ConfigError for a name that timm does not have, and for sizes or a drop path that the model cannot have.
    """
    _check_name(name)
    takes = _arguments(name)
    given: dict[str, Any] = {"in_chans": channels, "num_classes": classes, "drop_path_rate": drop_path}
    given |= {"img_size": height_and_width(image_size)}
    if drop_path and "drop_path_rate" not in takes:
        raise ConfigError(f"'{name}' has no drop path; drop_path={drop_path:g} cannot be")
    try:
        backbone = timm.create_model(name, pretrained=False, **{k: v for k, v in given.items() if k in takes})
    except REFUSALS as error:
        raise ConfigError(
            f"timm cannot build '{name}' for images of {times(image_size)} pixels with {channels} channels: {said(error)}"
        ) from None
    _check_patches(backbone, name, image_size)
    _without_dropout(backbone, drop_path)
    sample_drops(backbone)
    return backbone


@functools.cache
def backbone_outline(name: str, image_size: int | tuple[int, int], channels: int, classes: int = 0) -> Any:
    """What ``build_backbone`` builds, without memory for its weights; not to be changed. Errors: ConfigError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_backbone(name, image_size=image_size, channels=channels, classes=classes)


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
    return backbone.forward_head(last, pre_logits=True), _as_map(backbone, last)


def last_map(backbone: Any, images: Tensor) -> Tensor:
    """The last map [B, D, rows, columns] of normalised images [B, C, H, W], of a model of timm or an encoder of foveal's."""
    return _as_map(backbone, backbone.forward_features(images))


def _as_map(backbone: Any, last: Tensor) -> Tensor:
    if last.ndim == 3:
        return last[:, backbone.num_prefix_tokens :].transpose(1, 2).unflatten(2, backbone.patch_embed.grid_size)
    return last.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else last


def whole_alone(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
    """The pooled feature [B, D] of normalised images [B, C, H, W], of any model of timm, whatever its map."""
    return (backbone.forward_head(backbone.forward_features(images), pre_logits=True),)


def whole_and_places(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """As ``whole_and_map``, with the map's places in a row: (pooled [B, D], places [B, L, D])."""
    pooled, last = whole_and_map(backbone, images)
    return pooled, last.flatten(2).transpose(1, 2)


def width_of(name: str, image_size: int | tuple[int, int], channels: int) -> int:
    """The width of a model's pooled feature, found without memory. Errors: ConfigError."""
    return _seen(whole_alone, name, image_size, channels)[0].shape[1]


def shapes_of(name: str, image_size: int | tuple[int, int], channels: int) -> tuple[int, tuple[int, int, int]]:
    """The width of a model's pooled feature, and the (D, rows, columns) of its last map, found without memory.

    Errors: ConfigError, as ``build_backbone``, and for a model that has no such map of images of this size.
    """
    pooled, last = _seen(whole_and_map, name, image_size, channels)
    width, rows, columns = last.shape[1:]
    return pooled.shape[1], (width, rows, columns)


@functools.cache
def _seen(
    look: Callable[[Any, Tensor], tuple[Tensor, ...]], name: str, image_size: int | tuple[int, int], channels: int
) -> tuple[Tensor, ...]:
    """What a look at images gives, without memory. Errors: ConfigError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(name, image_size=image_size, channels=channels).eval()
        try:
            return look(backbone, torch.empty(2, channels, *height_and_width(image_size)))
        except REFUSALS as error:
            raise ConfigError(
                f"'{name}' makes no feature map of images of {times(image_size)} pixels: {said(error)}"
            ) from None


def check_training(name: str, image_size: int | tuple[int, int], channels: int, classes: int, at_once: int) -> None:
    """Refuse what a forward in training would: images that are too small, or too few of them for BatchNorm.

    Errors: ConfigError.
    """
    model = backbone_outline(name, image_size, channels, classes)
    images = torch.empty(at_once, channels, *height_and_width(image_size), device="meta")
    try:
        logits = model(images)
    except REFUSALS as error:
        raise ConfigError(
            f"'{name}' cannot learn from {at_once} images at once of {times(image_size)} pixels: {said(error)}"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (at_once, classes):
        raise ConfigError(f"'{name}' does not make one row of logits of an image; take another model")


def set_recompute(backbone: Any, enable: bool) -> None:
    """Recompute a model's activations in the backward pass, with the same result.

    The running statistics of BatchNorm follow a batch once, and not again where its forward is recomputed.
    Errors: ConfigError where timm cannot.
    """
    try:
        backbone.set_grad_checkpointing(enable)
    except REFUSALS:
        raise ConfigError(
            f"timm cannot recompute the activations of '{_name_of(backbone)}': set engine.recompute=false"
        ) from None
    for norm in batch_norms(backbone) if enable else []:
        norm.forward = functools.partial(_follow_once, norm, norm.forward)


def head_names(name: str, image_size: int | tuple[int, int], channels: int) -> tuple[str, ...]:
    """The names of a model's weights that it has, or has in this shape, only for its classes. Errors: ConfigError."""
    headed, bare = (backbone_outline(name, image_size, channels, classes).state_dict() for classes in (2, 0))
    return tuple(each for each in headed if each not in bare or bare[each].shape != headed[each].shape)


def classes_in(weights: dict[str, Tensor], name: str, image_size: int | tuple[int, int], channels: int) -> int:
    """How many classes the head of these weights of a model of timm has; 0: they have no head. Errors: ConfigError."""
    headed = backbone_outline(name, image_size, channels, 2).state_dict()
    rows = [each for each in head_names(name, image_size, channels) if each in weights and headed[each].shape[0] == 2]
    return max((weights[each].shape[0] for each in rows), default=0)


def check_resizing(told: BackboneCard, image_size: int | tuple[int, int], where: str) -> None:
    """The weights of some models of timm are those of one image size. Errors: ConfigError, ExportError."""
    now, was = (backbone_outline(told.timm, size, told.channels).state_dict() for size in (image_size, told.image_size))
    other = [name for name in was if name not in now or now[name].shape != was[name].shape]
    if other:
        raise ExportError(
            f"{where} is a {told.timm} of images of {times(told.image_size)} pixels and has weights of that size alone "
            f"({', '.join(other[:3])}); data.image_size is {times(image_size)}"
        )


def layers_of(backbone: Any) -> dict[str, int]:
    """The layer of each parameter as timm numbers them: 0 the stem, the largest the head.

    Errors: ConfigError where it does not.
    """
    try:
        return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    except REFUSALS:
        raise ConfigError(
            f"timm does not number the layers of '{_name_of(backbone)}', which optim.layer_decay needs: set it to 1"
        ) from None


def undecayed_of(backbone: Any) -> set[str]:
    """The names of the parameters that timm keeps from weight decay, besides vectors: positions and tables of biases."""
    patterns = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    names = [name for name, _ in backbone.named_parameters()]
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


@dataclass(frozen=True, slots=True)
class Origins:
    """What timm says of the weights that it has under a name.

    ``mean`` and ``std`` are of pixels in [0, 1]; ``image_size`` is (height, width); ``first`` is the first layer's name.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    first: str


def timms_origins(name: str) -> Origins:
    """Errors: ConfigError for a name that timm does not have."""
    _check_name(name)
    told: Any = timm.get_pretrained_cfg(name)
    first = told.first_conv if isinstance(told.first_conv, str) else (told.first_conv or ("",))[0]
    return Origins(tuple(told.mean), tuple(told.std), tuple(told.input_size[1:]), first)


def depends_on_others(model: nn.Module) -> bool:
    """Whether a sample's forward depends on the others of its micro on its rank, as under BatchNorm."""
    return bool(batch_norms(model))


def _follow_once(module: Any, forward: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """A forward that leaves the buffers alone where it recomputes, which is inside of a backward."""
    if torch._C._current_graph_task_id() == -1:  # noqa: SLF001 - torch's own checkpoint asks so
        return forward(given)
    with statistics_kept(module):
        return forward(given)


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "See timm.list_models()."
        raise ConfigError(f"'{name}' is not a model of timm {timm.__version__}. {hint}")


def _check_patches(backbone: Any, name: str, image_size: int | tuple[int, int]) -> None:
    """timm cuts off what is no whole patch. Errors: ConfigError."""
    embed: Any = getattr(backbone, "patch_embed", None)
    if type(embed) is not PatchEmbed:
        return
    down, across = cast(tuple[int, int], embed.patch_size)
    height, width = height_and_width(image_size)
    if height % down or width % across:
        raise ConfigError(
            f"image_size={times(image_size)} is not a whole number of the {down} x {across} patches of '{name}'"
        )


def _without_dropout(backbone: nn.Module, drop_path: float) -> None:
    """Some names of timm bring a dropout, or a drop path, of their own, which draws from the global generator."""
    for module in list(backbone.modules()):
        if isinstance(getattr(module, "drop_rate", None), float):  # of those that call a function
            cast(Any, module).drop_rate = 0.0
        for name, child in list(module.named_children()):
            if type(child) is DropPath and not drop_path:
                setattr(module, name, nn.Identity())
            if isinstance(child, nn.modules.dropout._DropoutNd):  # noqa: SLF001
                child.p = 0.0


def has_distillation_token(model: nn.Module) -> bool:
    """Whether a model has a token, and a head on it, that learn from a teacher (Touvron et al., "DeiT", 2021)."""
    return isinstance(model, VisionTransformerDistilled)


@functools.cache
def _arguments(name: str) -> frozenset[str]:
    """What timm passes on to a model of this name."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        kind = type(timm.create_model(name, pretrained=False))
    return frozenset(name for each in kind.__mro__ for name in inspect.signature(each.__init__).parameters)


def times(image_size: int | tuple[int, int]) -> str:
    """``224 x 224``: an image size for a reader."""
    return " x ".join(map(str, height_and_width(image_size)))


def _name_of(backbone: Any) -> str:
    return str(backbone.pretrained_cfg["architecture"])


def said(error: Exception) -> str:
    """What a refusal of timm's or torch's says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
