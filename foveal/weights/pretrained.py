"""Sources of pretrained models: a foveal export, or foreign weights of a timm model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from foveal.config import height_and_width
from foveal.data.config import DataConfig
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    backbone_card,
    backbone_from_card,
    check_resizable,
    count_head_classes,
    get_pretrained_info,
    parse_encoder_card,
)
from foveal.models.config import Pooling, VitConfig
from foveal.models.timm_vit import build_meta_encoder, get_encoder_sizes, has_absolute_positions
from foveal.models.vit import encoder_card, encoder_from_card
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout
from foveal.weights.export import Card, check_and_select_weights, read_card, read_export
from foveal.weights.foreign import find_weights_file, read_hf_config, read_num_heads, read_weights_as_timm

FOREIGN_STAGE = "foreign"  # the stage in a card for foreign weights
# Prefixes in foreign files beside the encoder and its head: poolers, and pretraining decoders.
_UNUSED = ("pooler.", "decoder", "mask_token", "embeddings.mask_token")
_SIZE = int | tuple[int, int]


@dataclass(frozen=True)
class PretrainedSource:
    """An inspected model; ``card`` rebuilds it and holds its file's digest."""

    path: Path
    card: Card
    stall_timeout: float = DEFAULT_STALL_TIMEOUT

    def load_weights(self) -> dict[str, Tensor]:
        """Return the weights (fp32, CPU) with the names and shapes of the card's module.

        Raises: ExportError if the file has changed since the inspection.
        """
        if self.card.stage == FOREIGN_STAGE:
            file = find_weights_file(self.path, self.stall_timeout)
            weights, digest = _read_foreign_weights(file, self.stall_timeout)
        else:
            weights, card = read_export(self.path, self.stall_timeout)
            digest = card.sha256
        if digest != self.card.sha256:
            raise ExportError(f"{self.path} has changed since the run was planned; start it again")
        return weights


def inspect_pretrained(path: Path, timm_name: str | None, data: DataConfig) -> PretrainedSource:
    """Inspect a model: a foveal export, or with ``timm_name`` a safetensors file or a folder with one.

    Nothing is downloaded, and no memory is allocated for the model. Foreign weights get a new card: an encoder card if
    foveal can train the named model and the weights have its sizes, so that its layers can be distillation targets,
    else a backbone card.
    Raises: ExportError for weights that do not fit; ConfigError for a name unknown to timm, and for an image size that
    is no multiple of the patch size.
    """
    stall_timeout = data.stall_timeout_seconds
    if timm_name is None and read_with_timeout(path, stall_timeout, lambda: _is_foreign_weights(path)):
        raise ExportError(
            f"{path} has no card.json, so it is no export of foveal's; for weights of others say which model of timm's "
            f"they are (init_name, or teacher_name in distillation)"
        )
    card = read_card(path, stall_timeout) if timm_name is None else _build_foreign_card(path, timm_name, data)
    encoder_spec = parse_encoder_card(card.encoder, f"{path}/card.json")
    if isinstance(encoder_spec, BackboneCard):
        check_resizable(encoder_spec, data.image_size, str(path))
    else:
        encoder_spec.trained_size_if_different(data.image_size)
    return PretrainedSource(path, card, stall_timeout)


def _is_foreign_weights(path: Path) -> bool:
    return not (path / "card.json").exists() and (path.is_file() or any(path.glob("*.safetensors")))


def _build_foreign_card(path: Path, name: str, data: DataConfig) -> Card:
    """Build the card for foreign weights. Raises: ConfigError, ExportError."""
    timm_info = get_pretrained_info(name)
    file = find_weights_file(path, data.stall_timeout_seconds)
    weights, digest = _read_foreign_weights(file, data.stall_timeout_seconds)
    hf_config = read_hf_config(file, data.stall_timeout_seconds)
    first_layer = weights.get(f"{timm_info.first_layer_name}.weight")
    if first_layer is not None and first_layer.ndim == 4 and first_layer.shape[1] != data.channels:
        raise ExportError(
            f"{path} has channels {first_layer.shape[1]}, data.channels is {data.channels}; they must be equal"
        )
    num_classes = count_head_classes(weights, name, timm_info.image_size, data.channels)
    encoder = _try_encoder_card(file, name, weights, data, num_classes) or _timm_backbone_card(
        path, name, weights, data, num_classes
    )
    mean, std = _pixel_statistics(path, name, hf_config, data)
    names = hf_config.get("label_names")
    if not isinstance(names, list) or len(names) != num_classes:
        names = []
    return Card(FOREIGN_STAGE, encoder, mean, std, classes=tuple(map(str, names)), sha256=digest)


def _read_foreign_weights(file: Path, stall_timeout: float) -> tuple[dict[str, Tensor], str]:
    """Return the classifier's weights in a foreign file, under timm's names, and the file's sha256."""
    all_weights, digest = read_weights_as_timm(file, stall_timeout)
    weights = {name: value for name, value in all_weights.items() if not name.startswith(_UNUSED)}
    if "cls_token" in weights and "head.weight" not in weights:
        # Hugging Face's ViT names its head "classifier".
        weights = {name.replace("classifier.", "head.", 1): value for name, value in weights.items()}
    return weights, digest


def _try_encoder_card(
    file: Path, name: str, weights: dict[str, Tensor], data: DataConfig, num_classes: int
) -> dict[str, Any] | None:
    """Return the encoder card if foveal can train the named model and the weights have its sizes, else None."""
    try:
        meta_encoder = build_meta_encoder(name)
    except ConfigError:
        return None
    sizes = get_encoder_sizes(meta_encoder)
    num_heads = read_num_heads(file, data.stall_timeout_seconds)
    if num_heads not in (None, sizes["heads"]):
        raise ExportError(f"{file} has heads {num_heads}, timm's {name} has {sizes['heads']}; they must be equal")
    size = data.image_size
    pos_embed = weights.get("pos_embed")
    if has_absolute_positions(meta_encoder) and pos_embed is not None and pos_embed.ndim == 3:
        num_prefix_tokens = meta_encoder.pos_embed.shape[1] - meta_encoder.patch_embed.num_patches
        size = _infer_image_size(pos_embed.shape[1] - num_prefix_tokens, sizes, size)
    pooling: Pooling = meta_encoder.global_pool
    if pooling not in get_args(Pooling):
        return None
    cfg = VitConfig(**sizes, name=name, positions="learned" if has_absolute_positions(meta_encoder) else None)
    try:
        card = encoder_card(cfg, size, data.channels, pooling=pooling, num_classes=num_classes)
        _check_weights_fit(encoder_from_card, card, weights, file)
    except (ConfigError, ExportError):
        return None
    return card


def _infer_image_size(num_patches: int, sizes: dict[str, Any], image_size: _SIZE) -> _SIZE:
    """Return the image size with this number of patches: ``image_size`` if it fits, else a square."""
    patch = sizes["patch"]
    if math.prod(side // patch for side in height_and_width(image_size)) == num_patches:
        return image_size
    return max(1, math.isqrt(max(num_patches, 0))) * patch


def _timm_backbone_card(
    path: Path, name: str, weights: dict[str, Tensor], data: DataConfig, num_classes: int
) -> dict[str, Any]:
    """Return the card of an unmodified timm model, for the data's image size or else timm's training size.

    Raises: ExportError that lists the mismatches.
    """
    data_card, timm_card = (
        backbone_card(name, size, data.channels, num_classes)
        for size in (data.image_size, get_pretrained_info(name).image_size)
    )
    try:
        _check_weights_fit(backbone_from_card, data_card, weights, path)
    except ExportError:
        _check_weights_fit(backbone_from_card, timm_card, weights, path)
        return timm_card
    return data_card


def _check_weights_fit(
    build: Callable[[dict[str, Any], str], nn.Module], card: dict[str, Any], weights: dict[str, Tensor], path: Path
) -> None:
    """Check that weights fit the module of a card, built on the meta device. Raises: ExportError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = build(card, str(path))
    check_and_select_weights(module, weights, path)


def _pixel_statistics(
    path: Path, name: str, hf_config: dict[str, Any], data: DataConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of the pixels that the weights were trained on: from config.json, the settings, or timm."""
    pretrained_cfg = hf_config.get("pretrained_cfg")
    if isinstance(pretrained_cfg, dict) and all(isinstance(pretrained_cfg.get(key), list) for key in ("mean", "std")):
        mean = tuple(pretrained_cfg["mean"])
        std = tuple(pretrained_cfg["std"])
        if not all(type(value) in (int, float) and math.isfinite(value) for value in mean + std) or min(std) <= 0:
            raise ExportError(
                f"the config.json beside {path} has the mean {list(mean)} and the std {list(std)}: set data.mean and "
                f"data.std"
            )
    elif data.mean is not None and data.std is not None:
        mean, std = data.mean, data.std
    else:
        timm_info = get_pretrained_info(name)
        mean, std = timm_info.mean, timm_info.std
    if not len(mean) == len(std) == data.channels:
        raise ExportError(
            f"{path} does not say how its images of {data.channels} channels were normalised: set data.mean and "
            f"data.std"
        )
    return mean, std
