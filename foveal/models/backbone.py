"""Image models of timm, unmodified: convolutional networks and hierarchical transformers beside foveal's encoders.

B images, D feature width, L = rows * columns locations of the last feature map.
"""

import fnmatch
import functools
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
from foveal.errors import ConfigError
from foveal.models.batch_norm import find_batch_norms, preserve_batch_norm_stats
from foveal.models.droppath import replace_drop_paths
from foveal.models.timm_args import check_timm_name, constructor_parameters, timm_backbone_args
from foveal.models.vit import EncoderCard, config_error_as_export

FeatureFn = Callable[[Any, Tensor], tuple[Tensor, ...]]  # (model, normalised images [B, C, H, W]) -> features

# The exceptions of timm's models for sizes that they do not support.
TIMM_ERRORS = (ArithmeticError, AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)


class BackboneCard(Config):
    """The name, image format and head from which a model of timm is rebuilt."""

    timm: str = science(description="timm's name of the model.")
    image_size: ImageSize = science(description="Image size in pixels: the side, or [height, width].")
    channels: int = science(description="Image channels.", ge=1)
    classes: int = science(0, "Outputs of the head; 0: no head.", ge=0)

    @property
    def build_args(self) -> tuple[str, int | tuple[int, int], int]:
        """The arguments of ``build_backbone`` for the model without a head: (timm's name, image size, channels)."""
        return self.timm, self.image_size, self.channels


def build_backbone(
    name: str, image_size: int | tuple[int, int], channels: int, *, num_classes: int = 0, drop_path: float = 0.0
) -> nn.Module:
    """Build a model of timm by name on the CPU in float32, initialised by timm, without dropout.

    ``num_classes`` are the head's outputs; 0: no head. Drop path noise comes from
    ``foveal.models.droppath.set_drop_path_noise``. Weights are drawn from torch's global generator:
    ``torch.manual_seed`` before this call makes them a function of the seed and of timm's version.
    Raises: ConfigError if timm has no such name, or if the model does not support the sizes or the drop path.
    """
    args = timm_backbone_args(name, image_size, channels, num_classes)
    if "drop_path_rate" in constructor_parameters(name):
        args["drop_path_rate"] = drop_path
    elif drop_path:
        raise ConfigError(f"'{name}' has no drop path; set drop_path=0 instead of {drop_path:g}")
    try:
        backbone = timm.create_model(name, pretrained=False, **args)
    except TIMM_ERRORS as error:
        raise ConfigError(
            f"timm cannot build '{name}' for images of {format_image_size(image_size)} pixels with {channels} "
            f"channels: {format_error_one_line(error)}"
        ) from None
    _check_patch_multiple(backbone, name, image_size)
    _remove_dropout(backbone, drop_path)
    replace_drop_paths(backbone)
    return backbone


@functools.cache
def build_meta_backbone(name: str, image_size: int | tuple[int, int], channels: int, num_classes: int = 0) -> Any:
    """Return ``build_backbone``'s model on the meta device; it is cached, do not modify it. Raises: ConfigError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_backbone(name, image_size=image_size, channels=channels, num_classes=num_classes)


def build_meta_model_as_stated(name: str, args: dict[str, Any]) -> nn.Module:
    """Return timm's own model of a name and arguments on the meta device. Raises: ConfigError."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return timm.create_model(name, pretrained=False, **args)
    except TIMM_ERRORS as error:
        raise ConfigError(f"timm cannot build '{name}' with {args}: {format_error_one_line(error)}") from None


def backbone_card(name: str, image_size: int | tuple[int, int], channels: int, num_classes: int = 0) -> dict[str, Any]:
    """Return the JSON-ready card from which ``backbone_from_card`` builds the same model."""
    return BackboneCard(timm=name, image_size=image_size, channels=channels, classes=num_classes).to_dict()


def parse_encoder_card(card: dict[str, Any], source: str) -> EncoderCard | BackboneCard:
    """Parse an export's card: of a foveal encoder, or of a model of timm. Raises: ConfigError."""
    return (BackboneCard if "timm" in card else EncoderCard).from_dict(card, source)


def backbone_from_card(
    card: dict[str, Any], source: str, *, drop_path: float = 0.0, num_classes: int | None = None
) -> nn.Module:
    """Build the model that a card describes, freshly initialised; ``num_classes`` overrides the card.

    Raises: ExportError if the card is invalid.
    """
    with config_error_as_export(source):
        parsed_card = BackboneCard.from_dict(card, source)
        num_classes = parsed_card.classes if num_classes is None else num_classes
        return build_backbone(*parsed_card.build_args, num_classes=num_classes, drop_path=drop_path)


def forward_pooled_and_map(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return (pooled [B, D], last map [B, D, rows, columns]) of normalised images [B, C, H, W].

    A transformer's patches are laid out on their grid.
    """
    features = backbone.forward_features(images)
    return backbone.forward_head(features, pre_logits=True), _to_feature_map(backbone, features)


def forward_feature_map(backbone: Any, images: Tensor) -> Tensor:
    """Return the last map [B, D, rows, columns] of normalised images [B, C, H, W], of a model of timm or an encoder."""
    return _to_feature_map(backbone, backbone.forward_features(images))


def forward_single_map(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
    """Return ``forward_feature_map`` as a tuple, the form of a ``FeatureFn``."""
    return (forward_feature_map(backbone, images),)


def _to_feature_map(backbone: Any, features: Tensor) -> Tensor:
    if features.ndim == 3:
        return features[:, backbone.num_prefix_tokens :].transpose(1, 2).unflatten(2, backbone.patch_embed.grid_size)
    return features.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features


def forward_pooled(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
    """Return the pooled feature ([B, D],) of normalised images [B, C, H, W]; works for models without a feature map."""
    return (backbone.forward_head(backbone.forward_features(images), pre_logits=True),)


def forward_pooled_and_patches(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return (pooled [B, D], the last map's locations [B, L, D]) of normalised images [B, C, H, W]."""
    pooled, feature_map = forward_pooled_and_map(backbone, images)
    return pooled, feature_map.flatten(2).transpose(1, 2)


def infer_pooled_width(name: str, image_size: int | tuple[int, int], channels: int) -> int:
    """Return the width of a model's pooled feature, from a forward on the meta device. Raises: ConfigError."""
    return _infer_outputs(forward_pooled, name, image_size, channels)[0].shape[1]


def infer_pooled_map_shapes(
    name: str, image_size: int | tuple[int, int], channels: int
) -> tuple[int, tuple[int, int, int]]:
    """Return the width of a model's pooled feature, and (D, rows, columns) of its last map, from the meta device.

    Raises: ConfigError, as ``build_backbone``, or if the model makes no such map of images of this size.
    """
    pooled, feature_map = _infer_outputs(forward_pooled_and_map, name, image_size, channels)
    width, rows, columns = feature_map.shape[1:]
    return pooled.shape[1], (width, rows, columns)


@functools.cache
def _infer_outputs(
    forward: FeatureFn, name: str, image_size: int | tuple[int, int], channels: int
) -> tuple[Tensor, ...]:
    """Return the outputs of ``forward`` on the meta device. Raises: ConfigError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(name, image_size=image_size, channels=channels).eval()
        try:
            return forward(backbone, torch.empty(2, channels, *height_and_width(image_size)))
        except TIMM_ERRORS as error:
            raise ConfigError(
                f"'{name}' makes no feature map of images of {format_image_size(image_size)} pixels: "
                f"{format_error_one_line(error)}"
            ) from None


def check_classifier_training(
    name: str, image_size: int | tuple[int, int], channels: int, num_classes: int, microbatch_size: int
) -> None:
    """Raise ConfigError if a training forward fails: images too small, or too few for BatchNorm."""
    model = build_meta_backbone(name, image_size, channels, num_classes)
    images = torch.empty(microbatch_size, channels, *height_and_width(image_size), device="meta")
    try:
        logits = model(images)
    except TIMM_ERRORS as error:
        raise ConfigError(
            f"'{name}' cannot train on a microbatch of {microbatch_size} images of {format_image_size(image_size)} "
            f"pixels: {format_error_one_line(error)}"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (microbatch_size, num_classes):
        raise ConfigError(f"'{name}' does not make one row of logits per image; use another model")


def set_activation_checkpointing(backbone: Any, enable: bool) -> None:
    """Switch the recomputation of a model's activations in the backward pass on or off; results are the same.

    BatchNorm's running statistics are updated by the forward, not by its recomputation.
    Raises: ConfigError if timm does not support it for the model.
    """
    try:
        backbone.set_grad_checkpointing(enable)
    except TIMM_ERRORS:
        raise ConfigError(
            f"timm cannot recompute the activations of '{_architecture_name(backbone)}': set engine.activation_checkpointing=false"
        ) from None
    for norm in find_batch_norms(backbone) if enable else []:
        norm.forward = functools.partial(_forward_updating_stats_once, norm, norm.forward)


def head_parameter_names(name: str, image_size: int | tuple[int, int], channels: int) -> tuple[str, ...]:
    """Return the names of the weights that exist, or have their shape, only with a head. Raises: ConfigError."""
    headed, bare = (build_meta_backbone(name, image_size, channels, classes).state_dict() for classes in (2, 0))
    return tuple(key for key, weight in headed.items() if key not in bare or bare[key].shape != weight.shape)


def count_head_classes(weights: dict[str, Tensor], name: str, image_size: int | tuple[int, int], channels: int) -> int:
    """Return the number of classes of the head in a timm model's weights; 0: no head. Raises: ConfigError."""
    headed = build_meta_backbone(name, image_size, channels, 2).state_dict()
    head_names = head_parameter_names(name, image_size, channels)
    sizes = [weights[key].shape[0] for key in head_names if key in weights and headed[key].shape[0] == 2]
    return max(sizes, default=0)


def get_layer_ids(backbone: Any) -> dict[str, int]:
    """Return timm's layer number of each parameter: 0 the stem, the largest the head.

    Raises: ConfigError if timm does not number the model's layers.
    """
    try:
        return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    except TIMM_ERRORS:
        raise ConfigError(
            f"timm does not number the layers of '{_architecture_name(backbone)}': set optim.layer_decay=1"
        ) from None


def get_no_weight_decay_names(backbone: Any) -> set[str]:
    """Return the parameters that timm excludes from weight decay, besides vectors: positions and bias tables."""
    patterns = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    names = [name for name, _ in backbone.named_parameters()]
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


@dataclass(frozen=True, slots=True)
class PretrainedInfo:
    """timm's description of a name's pretrained weights.

    ``mean`` and ``std`` are of pixels in [0, 1]; ``image_size`` is (height, width).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    first_layer_name: str


def get_pretrained_info(name: str) -> PretrainedInfo:
    """Return timm's description of a name's pretrained weights. Raises: ConfigError if timm has no such name."""
    check_timm_name(name)
    cfg: Any = timm.get_pretrained_cfg(name)
    first_layer = cfg.first_conv if isinstance(cfg.first_conv, str) else (cfg.first_conv or ("",))[0]
    return PretrainedInfo(tuple(cfg.mean), tuple(cfg.std), tuple(cfg.input_size[1:]), first_layer)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a sample's forward depends on the rest of the microbatch, as under BatchNorm."""
    return bool(find_batch_norms(model))


def _forward_updating_stats_once(module: Any, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Run a forward that keeps the buffers unchanged during recomputation, that is, inside a backward."""
    if torch._C._current_graph_task_id() == -1:  # noqa: SLF001 - as torch's own checkpoint does
        return forward(inputs)
    with preserve_batch_norm_stats(module):
        return forward(inputs)


def _check_patch_multiple(backbone: Any, name: str, image_size: int | tuple[int, int]) -> None:
    """Raise ConfigError if the image is not a whole number of patches: timm would crop it silently."""
    patch_embed: Any = getattr(backbone, "patch_embed", None)
    if type(patch_embed) is not PatchEmbed:
        return
    patch_height, patch_width = cast(tuple[int, int], patch_embed.patch_size)
    height, width = height_and_width(image_size)
    if height % patch_height or width % patch_width:
        raise ConfigError(
            f"image_size={format_image_size(image_size)} is not a whole number of the {patch_height} x {patch_width} "
            f"patches of '{name}'"
        )


def _remove_dropout(backbone: nn.Module, drop_path: float) -> None:
    """Disable the dropout and drop path that some names of timm bring: both draw from the global generator."""
    for module in list(backbone.modules()):
        if isinstance(getattr(module, "drop_rate", None), float):  # modules that call F.dropout
            cast(Any, module).drop_rate = 0.0
        for name, child in list(module.named_children()):
            if type(child) is DropPath and not drop_path:
                setattr(module, name, nn.Identity())
            if isinstance(child, nn.modules.dropout._DropoutNd):  # noqa: SLF001
                child.p = 0.0


def has_distillation_token(model: nn.Module) -> bool:
    """Return whether a model has a distillation token and a head on it (Touvron et al., "DeiT", 2021)."""
    return isinstance(model, VisionTransformerDistilled)


def format_image_size(image_size: int | tuple[int, int]) -> str:
    """Return an image size as text: ``224 x 224``."""
    return " x ".join(map(str, height_and_width(image_size)))


def _architecture_name(backbone: Any) -> str:
    return str(backbone.pretrained_cfg["architecture"])


def format_error_one_line(error: Exception) -> str:
    """Return the message of an error of timm's or torch's in one line."""
    return " ".join(str(error).split()) or type(error).__name__
