"""Where a model comes from: an export of ours, or weights that others left for a model of timm."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from foveal.config import height_and_width
from foveal.data import DataConfig
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
from foveal.models.timm_vit import build_meta_encoder, get_encoder_sizes, has_absolute_positions
from foveal.models.vit import Pooling, VitConfig, encoder_card, encoder_from_card
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout
from foveal.weights.export import Card, read_card, read_export, select_matching_weights
from foveal.weights.foreign import find_weights_file, read_hf_config, read_num_heads, read_weights_as_timm

FOREIGN_STAGE = "foreign"  # the stage of a card that is made up
# What others' files hold beside an encoder and its head: poolers, and decoders of whoever pretrained.
_UNUSED = ("pooler.", "decoder", "mask_token", "embeddings.mask_token")
_SIZE = int | tuple[int, int]


@dataclass(frozen=True)
class PretrainedSource:
    """A model that was looked at: ``card`` says what builds it, and the digest of its file."""

    path: Path
    card: Card
    stall_timeout: float = DEFAULT_STALL_TIMEOUT

    def load_weights(self) -> dict[str, Tensor]:
        """Its weights (fp32, CPU): names and shapes are those of what the card builds.

        Raises: ExportError where they are no longer those that were looked at.
        """
        if self.card.stage == FOREIGN_STAGE:
            file = find_weights_file(self.path, self.stall_timeout)
            weights, found = _read_foreign_weights(file, self.stall_timeout)
        else:
            weights, card = read_export(self.path, self.stall_timeout)
            found = card.sha256
        if found != self.card.sha256:
            raise ExportError(f"{self.path} has changed since the run was planned; start it again")
        return weights


def inspect_pretrained(path: Path, timm_name: str | None, data: DataConfig) -> PretrainedSource:
    """Look at a model: an export of ours, or with timm's ``name`` a safetensors file or a folder with one.

    Nothing is downloaded, and the model is not built. The card of foreign weights is made up: an encoder's where the
    name is one that foveal can train and the weights are of its sizes, so that its layers can teach, else a backbone's.
    Raises: ExportError, one sentence for what does not fit; ConfigError for a name that timm does not have, and for
    images that are no whole number of patches.
    """
    patience = data.patience_seconds
    if timm_name is None and read_with_timeout(path, patience, lambda: _is_foreign_weights(path)):
        raise ExportError(
            f"{path} has no card.json, so it is no export of foveal's; for weights of others say which model of timm's they "
            f"are (init_name, or teacher_name in distillation)"
        )
    card = read_card(path, patience) if timm_name is None else _build_foreign_card(path, timm_name, data)
    told = parse_encoder_card(card.encoder, f"{path}/card.json")
    if isinstance(told, BackboneCard):
        check_resizable(told, data.image_size, str(path))
    else:
        told.trained_size_if_different(data.image_size)
    return PretrainedSource(path, card, patience)


def _is_foreign_weights(place: Path) -> bool:
    return not (place / "card.json").exists() and (place.is_file() or any(place.glob("*.safetensors")))


def _build_foreign_card(place: Path, name: str, data: DataConfig) -> Card:
    """The card that weights of others would have. Raises: ConfigError, ExportError."""
    patience = data.patience_seconds
    timms, file = get_pretrained_info(name), find_weights_file(place, patience)
    (weights, digest), told = _read_foreign_weights(file, patience), read_hf_config(file, patience)
    first = weights.get(f"{timms.first_layer}.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != data.channels:
        raise ExportError(
            f"{place} has channels {first.shape[1]}, data.channels is {data.channels}; they must be equal"
        )
    classes = count_head_classes(weights, name, timms.image_size, data.channels)
    encoder = _try_encoder_card(file, name, weights, data, classes) or _timm_backbone_card(
        place, name, weights, data, classes
    )
    mean, std = _pixel_statistics(place, name, told, data)
    names = told.get("label_names")
    if not isinstance(names, list) or len(names) != classes:
        names = []
    return Card(FOREIGN_STAGE, encoder, mean, std, classes=tuple(map(str, names)), sha256=digest)


def _read_foreign_weights(file: Path, patience: float) -> tuple[dict[str, Tensor], str]:
    """The weights of others under timm's names, without what belongs to no classifier, and their file's sha256."""
    whole, digest = read_weights_as_timm(file, patience)
    weights = {name: value for name, value in whole.items() if not name.startswith(_UNUSED)}
    if "cls_token" in weights and "head.weight" not in weights:
        # Hugging Face's ViT has its head under another name.
        weights = {name.replace("classifier.", "head.", 1): value for name, value in weights.items()}
    return weights, digest


def _try_encoder_card(
    file: Path, name: str, weights: dict[str, Tensor], data: DataConfig, classes: int
) -> dict[str, Any] | None:
    """The card of an encoder of foveal's, if the name is one's and the weights are of its sizes."""
    try:
        timms = build_meta_encoder(name)
    except ConfigError:
        return None
    sizes, heads, table = (
        get_encoder_sizes(timms),
        read_num_heads(file, data.patience_seconds),
        weights.get("pos_embed"),
    )
    if heads not in (None, sizes["heads"]):
        raise ExportError(f"{file} has heads {heads}, timm's {name} has {sizes['heads']}; they must be equal")
    size = data.image_size
    if has_absolute_positions(timms) and table is not None and table.ndim == 3:
        size = _infer_image_size(table.shape[1] - timms.pos_embed.shape[1] + timms.patch_embed.num_patches, sizes, size)
    pooling: Pooling = timms.global_pool
    if pooling not in get_args(Pooling):
        return None
    cfg = VitConfig(**sizes, name=name, positions="learned" if has_absolute_positions(timms) else None)
    try:
        card = encoder_card(cfg, size, data.channels, pooling=pooling, num_classes=classes)
        _check_weights_fit(encoder_from_card, card, weights, file)
    except (ConfigError, ExportError):
        return None
    return card


def _infer_image_size(patches: int, sizes: dict[str, Any], image_size: _SIZE) -> _SIZE:
    """The size of the images of so many patches: ours, or else a square's."""
    patch = sizes["patch"]
    if math.prod(side // patch for side in height_and_width(image_size)) == patches:
        return image_size
    return max(1, math.isqrt(max(patches, 0))) * patch


def _timm_backbone_card(
    place: Path, name: str, weights: dict[str, Tensor], data: DataConfig, classes: int
) -> dict[str, Any]:
    """The card of a model of timm as it is, for our images, or else for those that timm trained it on.

    Raises: ExportError that lists what does not fit.
    """
    ours, timms = (
        backbone_card(name, size, data.channels, classes)
        for size in (data.image_size, get_pretrained_info(name).image_size)
    )
    try:
        _check_weights_fit(backbone_from_card, ours, weights, place)
    except ExportError:
        _check_weights_fit(backbone_from_card, timms, weights, place)
        return timms
    return ours


def _check_weights_fit(
    build: Callable[[dict[str, Any], str], nn.Module], card: dict[str, Any], weights: dict[str, Tensor], place: Path
) -> None:
    """Whether weights are what a card builds, without memory for it. Raises: ExportError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = build(card, str(place))
    select_matching_weights(module, weights, place)


def _pixel_statistics(
    place: Path, name: str, told: dict[str, Any], data: DataConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels that the weights were trained on: what is beside them, or set, or timm's."""
    beside, timms = told.get("pretrained_cfg"), get_pretrained_info(name)
    if isinstance(beside, dict) and all(isinstance(beside.get(each), list) for each in ("mean", "std")):
        mean, std = tuple(beside["mean"]), tuple(beside["std"])
        if not all(type(value) in (int, float) and math.isfinite(value) for value in mean + std) or min(std) <= 0:
            raise ExportError(
                f"the config.json beside {place} has the mean {list(mean)} and the std {list(std)}: set data.mean and data.std"
            )
    elif data.mean is not None and data.std is not None:
        mean, std = data.mean, data.std
    else:
        mean, std = timms.mean, timms.std
    if not len(mean) == len(std) == data.channels:
        raise ExportError(
            f"{place} does not say how its images of {data.channels} channels were normalised: set data.mean and data.std"
        )
    return mean, std
