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
from foveal.models.batch_norm import find_batch_norms, preserve_batch_norm_stats
from foveal.models.droppath import replace_drop_paths
from foveal.models.vit import EncoderCard

# What timm's models raise for sizes that they cannot have.
TIMM_ERRORS = (ArithmeticError, AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)


class BackboneCard(Config):
    """What it takes to build a model of timm again."""

    timm: str = science(description="timm's name")
    image_size: ImageSize = science(description="pixels of its images: the side, or [height, width]")
    channels: int = science(description="channels of its images", ge=1)
    classes: int = science(0, "outputs of its head; 0: it has none", ge=0)

    @property
    def build_args(self) -> tuple[str, int | tuple[int, int], int]:
        """What all but the head of it depends on: (timm's name, image size, channels)."""
        return self.timm, self.image_size, self.channels


def build_backbone(
    name: str, image_size: int | tuple[int, int], channels: int, *, num_classes: int = 0, drop_path: float = 0.0
) -> nn.Module:
    """timm's model of a name on the CPU in float32, freshly initialised as timm does, without dropout.

    ``classes`` are the outputs of its head; 0: none. Drop path takes its draws from ``foveal.models.droppath.set_drops``.
    The weights are drawn from torch's global generator: ``torch.manual_seed`` before this call makes them a function of
    the seed and of timm's version.
    Raises: ConfigError for a name that timm does not have, and for sizes or a drop path that the model cannot have.
    """
    _check_timm_name(name)
    takes = _constructor_parameters(name)
    given: dict[str, Any] = {"in_chans": channels, "num_classes": num_classes, "drop_path_rate": drop_path}
    given |= {"img_size": height_and_width(image_size)}
    if drop_path and "drop_path_rate" not in takes:
        raise ConfigError(f"'{name}' has no drop path; drop_path={drop_path:g} cannot be")
    try:
        backbone = timm.create_model(name, pretrained=False, **{k: v for k, v in given.items() if k in takes})
    except TIMM_ERRORS as error:
        raise ConfigError(
            f"timm cannot build '{name}' for images of {format_image_size(image_size)} pixels with {channels} channels: {format_error(error)}"
        ) from None
    _check_patch_multiple(backbone, name, image_size)
    _remove_dropout(backbone, drop_path)
    replace_drop_paths(backbone)
    return backbone


@functools.cache
def build_meta_backbone(name: str, image_size: int | tuple[int, int], channels: int, num_classes: int = 0) -> Any:
    """What ``build_backbone`` builds, without memory for its weights; not to be changed. Raises: ConfigError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_backbone(name, image_size=image_size, channels=channels, num_classes=num_classes)


def backbone_card(name: str, image_size: int | tuple[int, int], channels: int, num_classes: int = 0) -> dict[str, Any]:
    """Plain data, ready for JSON, from which ``backbone_from_card`` builds the same model."""
    return BackboneCard(timm=name, image_size=image_size, channels=channels, classes=num_classes).to_dict()


def parse_encoder_card(card: dict[str, Any], where: str) -> EncoderCard | BackboneCard:
    """What an export's card says of its model: an encoder of foveal's, or a model of timm. Raises: ConfigError."""
    return (BackboneCard if "timm" in card else EncoderCard).from_dict(card, where)


def backbone_from_card(
    card: dict[str, Any], where: str, *, drop_path: float = 0.0, num_classes: int | None = None
) -> nn.Module:
    """A model like the one a card was made for, freshly initialised; the classes may be others. Raises: ExportError."""
    try:
        told = BackboneCard.from_dict(card, where)
        size = {"image_size": told.image_size, "channels": told.channels}
        return build_backbone(
            told.timm, **size, num_classes=told.classes if num_classes is None else num_classes, drop_path=drop_path
        )
    except ConfigError as error:
        sentence = str(error)
        raise ExportError(sentence if sentence.startswith(where) else f"{where}: {sentence}") from None


def forward_pooled_and_map(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a model of timm makes of normalised images [B, C, H, W] before its head: (pooled [B, D], last map [B, D, rows, columns]).

    A transformer's patches are laid out as the grid that they came from.
    """
    last = backbone.forward_features(images)
    return backbone.forward_head(last, pre_logits=True), _to_feature_map(backbone, last)


def forward_feature_map(backbone: Any, images: Tensor) -> Tensor:
    """The last map [B, D, rows, columns] of normalised images [B, C, H, W], of a model of timm or an encoder of foveal's."""
    return _to_feature_map(backbone, backbone.forward_features(images))


def _to_feature_map(backbone: Any, features: Tensor) -> Tensor:
    if features.ndim == 3:
        return features[:, backbone.num_prefix_tokens :].transpose(1, 2).unflatten(2, backbone.patch_embed.grid_size)
    return features.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features


def forward_pooled(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
    """The pooled feature [B, D] of normalised images [B, C, H, W], of any model of timm, whatever its map."""
    return (backbone.forward_head(backbone.forward_features(images), pre_logits=True),)


def forward_pooled_and_tokens(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """As ``whole_and_map``, with the map's places in a row: (pooled [B, D], places [B, L, D])."""
    pooled, last = forward_pooled_and_map(backbone, images)
    return pooled, last.flatten(2).transpose(1, 2)


def infer_pooled_width(name: str, image_size: int | tuple[int, int], channels: int) -> int:
    """The width of a model's pooled feature, found without memory. Raises: ConfigError."""
    return _infer_outputs(forward_pooled, name, image_size, channels)[0].shape[1]


def infer_feature_shapes(
    name: str, image_size: int | tuple[int, int], channels: int
) -> tuple[int, tuple[int, int, int]]:
    """The width of a model's pooled feature, and the (D, rows, columns) of its last map, found without memory.

    Raises: ConfigError, as ``build_backbone``, and for a model that has no such map of images of this size.
    """
    pooled, last = _infer_outputs(forward_pooled_and_map, name, image_size, channels)
    width, rows, columns = last.shape[1:]
    return pooled.shape[1], (width, rows, columns)


@functools.cache
def _infer_outputs(
    forward: Callable[[Any, Tensor], tuple[Tensor, ...]], name: str, image_size: int | tuple[int, int], channels: int
) -> tuple[Tensor, ...]:
    """What a look at images gives, without memory. Raises: ConfigError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(name, image_size=image_size, channels=channels).eval()
        try:
            return forward(backbone, torch.empty(2, channels, *height_and_width(image_size)))
        except TIMM_ERRORS as error:
            raise ConfigError(
                f"'{name}' makes no feature map of images of {format_image_size(image_size)} pixels: {format_error(error)}"
            ) from None


def check_training_forward(
    name: str, image_size: int | tuple[int, int], channels: int, num_classes: int, microbatch_size: int
) -> None:
    """Refuse what a forward in training would: images that are too small, or too few of them for BatchNorm.

    Raises: ConfigError.
    """
    model = build_meta_backbone(name, image_size, channels, num_classes)
    images = torch.empty(microbatch_size, channels, *height_and_width(image_size), device="meta")
    try:
        logits = model(images)
    except TIMM_ERRORS as error:
        raise ConfigError(
            f"'{name}' cannot learn from {microbatch_size} images at once of {format_image_size(image_size)} pixels: {format_error(error)}"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (microbatch_size, num_classes):
        raise ConfigError(f"'{name}' does not make one row of logits of an image; take another model")


def set_activation_checkpointing(backbone: Any, enable: bool) -> None:
    """Recompute a model's activations in the backward pass, with the same result.

    The running statistics of BatchNorm follow a batch once, and not again where its forward is recomputed.
    Raises: ConfigError where timm cannot.
    """
    try:
        backbone.set_grad_checkpointing(enable)
    except TIMM_ERRORS:
        raise ConfigError(
            f"timm cannot recompute the activations of '{_architecture_name(backbone)}': set engine.recompute=false"
        ) from None
    for norm in find_batch_norms(backbone) if enable else []:
        norm.forward = functools.partial(_forward_updating_stats_once, norm, norm.forward)


def head_parameter_names(name: str, image_size: int | tuple[int, int], channels: int) -> tuple[str, ...]:
    """The names of a model's weights that it has, or has in this shape, only for its classes. Raises: ConfigError."""
    headed, bare = (build_meta_backbone(name, image_size, channels, classes).state_dict() for classes in (2, 0))
    return tuple(each for each in headed if each not in bare or bare[each].shape != headed[each].shape)


def count_head_classes(weights: dict[str, Tensor], name: str, image_size: int | tuple[int, int], channels: int) -> int:
    """How many classes the head of these weights of a model of timm has; 0: they have no head. Raises: ConfigError."""
    headed = build_meta_backbone(name, image_size, channels, 2).state_dict()
    rows = [
        each
        for each in head_parameter_names(name, image_size, channels)
        if each in weights and headed[each].shape[0] == 2
    ]
    return max((weights[each].shape[0] for each in rows), default=0)


def check_resizable(card: BackboneCard, image_size: int | tuple[int, int], where: str) -> None:
    """The weights of some models of timm are those of one image size. Raises: ConfigError, ExportError."""
    now, was = (
        build_meta_backbone(card.timm, size, card.channels).state_dict() for size in (image_size, card.image_size)
    )
    other = [name for name in was if name not in now or now[name].shape != was[name].shape]
    if other:
        raise ExportError(
            f"{where} is a {card.timm} of images of {format_image_size(card.image_size)} pixels and has weights of that size alone "
            f"({', '.join(other[:3])}); data.image_size is {format_image_size(image_size)}"
        )


def get_layer_ids(backbone: Any) -> dict[str, int]:
    """The layer of each parameter as timm numbers them: 0 the stem, the largest the head.

    Raises: ConfigError where it does not.
    """
    try:
        return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    except TIMM_ERRORS:
        raise ConfigError(
            f"timm does not number the layers of '{_architecture_name(backbone)}', which optim.layer_decay needs: set it to 1"
        ) from None


def get_no_weight_decay_names(backbone: Any) -> set[str]:
    """The names of the parameters that timm keeps from weight decay, besides vectors: positions and tables of biases."""
    patterns = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    names = [name for name, _ in backbone.named_parameters()]
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


@dataclass(frozen=True, slots=True)
class PretrainedInfo:
    """What timm says of the weights that it has under a name.

    ``mean`` and ``std`` are of pixels in [0, 1]; ``image_size`` is (height, width); ``first`` is the first layer's name.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    first_layer: str


def get_pretrained_info(name: str) -> PretrainedInfo:
    """Raises: ConfigError for a name that timm does not have."""
    _check_timm_name(name)
    told: Any = timm.get_pretrained_cfg(name)
    first = told.first_conv if isinstance(told.first_conv, str) else (told.first_conv or ("",))[0]
    return PretrainedInfo(tuple(told.mean), tuple(told.std), tuple(told.input_size[1:]), first)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a sample's forward depends on the others of its micro on its rank, as under BatchNorm."""
    return bool(find_batch_norms(model))


def _forward_updating_stats_once(module: Any, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """A forward that leaves the buffers alone where it recomputes, which is inside of a backward."""
    if torch._C._current_graph_task_id() == -1:  # noqa: SLF001 - torch's own checkpoint asks so
        return forward(inputs)
    with preserve_batch_norm_stats(module):
        return forward(inputs)


def _check_timm_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "See timm.list_models()."
        raise ConfigError(f"'{name}' is not a model of timm {timm.__version__}. {hint}")


def _check_patch_multiple(backbone: Any, name: str, image_size: int | tuple[int, int]) -> None:
    """timm cuts off what is no whole patch. Raises: ConfigError."""
    embed: Any = getattr(backbone, "patch_embed", None)
    if type(embed) is not PatchEmbed:
        return
    down, across = cast(tuple[int, int], embed.patch_size)
    height, width = height_and_width(image_size)
    if height % down or width % across:
        raise ConfigError(
            f"image_size={format_image_size(image_size)} is not a whole number of the {down} x {across} patches of '{name}'"
        )


def _remove_dropout(backbone: nn.Module, drop_path: float) -> None:
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
def _constructor_parameters(name: str) -> frozenset[str]:
    """What timm passes on to a model of this name."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        kind = type(timm.create_model(name, pretrained=False))
    return frozenset(name for each in kind.__mro__ for name in inspect.signature(each.__init__).parameters)


def format_image_size(image_size: int | tuple[int, int]) -> str:
    """``224 x 224``: an image size for a reader."""
    return " x ".join(map(str, height_and_width(image_size)))


def _architecture_name(backbone: Any) -> str:
    return str(backbone.pretrained_cfg["architecture"])


def format_error(error: Exception) -> str:
    """What a refusal of timm's or torch's says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
