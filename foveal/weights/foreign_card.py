"""The card of foreign weights: the timm model that they are, its image size, pixel statistics and class names."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from foveal.config import height_and_width
from foveal.data.config import DataConfig
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import (
    backbone_card,
    backbone_from_card,
    build_meta_backbone,
    count_head_classes,
    get_pretrained_info,
    parse_encoder_card,
)
from foveal.models.config import Pooling, VitConfig
from foveal.models.resizable import find_weights_of_image_size
from foveal.models.timm_vit import build_meta_encoder, get_encoder_sizes, has_absolute_positions
from foveal.models.vit import encoder_card, encoder_from_card
from foveal.weights.export import Card, check_and_select_weights, check_finite
from foveal.weights.foreign import ForeignWeights, find_weights_file, read_weights_as_timm
from foveal.weights.hub_files import HubFiles, PixelStatistics, StatisticsError, read_hub_files
from foveal.weights.position_grid import ambiguous_size_error, infer_patch_grid
from foveal.weights.stated_architecture import check_stated_architecture
from foveal.weights.timm_names import UNUSED_PREFIXES

FOREIGN_STAGE = "foreign"  # the stage in a card for foreign weights
_HEAD_NAMES = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
_EPSILON_TOLERANCE = 1e-5  # 1e-12 and 1e-6 of published models differ less than by rounding
_GELU_NAMES = {"gelu", "gelu_python"}  # Hugging Face's names of the exact GELU


def build_foreign_card(path: Path, name: str, data: DataConfig) -> tuple[Card, tuple[str, ...]]:
    """Return the card for foreign weights of timm's model ``name``, and sentences about them for the plan.

    Raises: ConfigError, ExportError.
    """
    timm_info = get_pretrained_info(name)
    file = find_weights_file(path, data.stall_timeout_seconds)
    foreign = read_foreign_model(file, name, data.stall_timeout_seconds)
    weights, hub = foreign.tensors, read_hub_files(file, data.stall_timeout_seconds)
    first_layer = weights.get(f"{timm_info.first_layer_name}.weight")
    if first_layer is not None and first_layer.ndim == 4 and first_layer.shape[1] != data.channels:
        raise ExportError(
            f"{path} has channels {first_layer.shape[1]}, data.channels is {data.channels}; they must be equal"
        )
    num_classes = count_head_classes(weights, name, timm_info.image_size, data.channels)
    notes, model = list(foreign.notes), build_meta_backbone(name, timm_info.image_size, data.channels)
    if foreign.is_hugging_face:
        notes += check_hub_config(hub, model, name, data)
    encoder = _try_encoder_card(file, name, weights, hub, data, num_classes) or _timm_backbone_card(
        path, name, weights, hub, data, num_classes
    )
    if data.weights_version > 1:
        notes += check_stated_architecture(hub, model, name)
    if foreign.is_hugging_face:
        check_square_window(path, parse_encoder_card(encoder, str(path)).image_size, weights)
    statistics = _pixel_statistics(path, name, hub, data)
    notes.append(f"pixels have mean {_format(statistics.mean)}, std {_format(statistics.std)}: {statistics.origin}")
    classes = hub.class_names(num_classes) if data.weights_version > 1 else hub.label_names(num_classes)
    card = Card(FOREIGN_STAGE, encoder, statistics.mean, statistics.std, classes=classes, sha256=foreign.sha256)
    return card, tuple(notes)


def read_foreign_model(file: Path, name: str, stall_timeout: float) -> ForeignWeights:
    """Return a file's weights for timm's model ``name``: without decoders and poolers, heads under timm's names.

    A head that timm's model has not in this form is left out: one on the class token and the mean of the patches, and
    a single one where timm averages two.
    """
    model_names = build_meta_backbone(name, get_pretrained_info(name).image_size, 3).state_dict()
    foreign = read_weights_as_timm(file, model_names, stall_timeout)
    weights = {key: value for key, value in foreign.tensors.items() if not key.startswith(UNUSED_PREFIXES)}
    check_finite(weights, file)
    if not foreign.is_hugging_face or "head.weight" in weights:
        return foreign.replace_tensors(weights)
    heads = {key: _rename_head(key) for key in weights if key.partition(".")[0] in _HEAD_NAMES}
    weights = {heads.get(key, key): value for key, value in weights.items()}
    width, head = weights["patch_embed.proj.weight"].shape[0], weights.get("head.weight")
    reason = ""
    if head is not None and head.shape[1] != width:
        reason = f"it reads {head.shape[1]} features, not the {width} of a token"
    elif head is not None and "dist_token" in weights and "head_dist.weight" not in weights:
        reason = "it reads the class token alone, and timm averages the logits of two tokens"
    if not reason:
        return foreign.replace_tensors(weights)
    kept = {key: value for key, value in weights.items() if not key.startswith("head")}
    return foreign.replace_tensors(kept, f"classifier left out: {reason}")


def _rename_head(name: str) -> str:
    module, _, parameter = name.partition(".")
    return f"{_HEAD_NAMES[module]}.{parameter}"


def check_hub_config(hub: HubFiles, model: Any, name: str, data: DataConfig) -> list[str]:
    """Check what Hugging Face's config.json says of a model, and weights do not show; return sentences for the plan.

    Raises: ExportError for another number of heads, another activation, other periods of rotary positions, or a much larger
    epsilon than timm's model has.
    """
    block = model.blocks[0] if hasattr(model, "blocks") else None
    num_heads = getattr(getattr(block, "attn", None), "num_heads", None)
    if hub.num_heads is not None and num_heads is not None and hub.num_heads != num_heads:
        raise ExportError(f"{hub.weights} has heads {hub.num_heads}, timm's {name} has {num_heads}; they must be equal")
    activation = getattr(getattr(block, "mlp", None), "act", None)
    is_same = hub.activation in _GELU_NAMES and getattr(activation, "approximate", "none") == "none"
    if hub.activation is not None and type(activation) is nn.GELU and not is_same and data.weights_version > 1:
        raise ExportError(
            f"{hub.weights} has the activation {hub.activation} (hidden_act in config.json), timm's {name} has the exact "
            f"GELU; the same weights would give other features"
        )
    temperature = getattr(getattr(model, "rope", None), "temperature", None)
    if None not in (hub.rope_temperature, temperature) and hub.rope_temperature != temperature:
        raise ExportError(
            f"{hub.weights} has rotary positions of base {hub.rope_temperature:g} (rope_theta in config.json), timm's "
            f"{name} of base {temperature:g}; the same weights would give other features"
        )
    epsilon = getattr(getattr(block, "norm1", None), "eps", None)
    if hub.norm_epsilon is None or epsilon is None or hub.norm_epsilon == epsilon:
        return []
    if abs(hub.norm_epsilon - epsilon) <= _EPSILON_TOLERANCE or data.weights_version == 1:
        return [f"norms add timm's {epsilon:g} to the variance, config.json says {hub.norm_epsilon:g}"]
    raise ExportError(
        f"{hub.weights} has norms that add {hub.norm_epsilon:g} to the variance (layer_norm_eps in config.json), timm's "
        f"{name} adds {epsilon:g}; the same weights would give other features"
    )


def check_square_window(path: Path, image_size: int | tuple[int, int], weights: dict[str, Tensor]) -> None:
    """Raise ExportError for Hugging Face's BEiT with bias tables of a window that is not square.

    transformers (5.23) resamples such a table with rows and columns exchanged: other attention than timm's.
    """
    height, width = height_and_width(image_size)
    if height != width and any(key.endswith("relative_position_bias_table") for key in weights):
        raise ExportError(
            f"{path} has bias tables under Hugging Face's names for images of {height} x {width} pixels, which "
            f"transformers and timm read differently; give the weights under timm's names"
        )


def _try_encoder_card(
    file: Path, name: str, weights: dict[str, Tensor], hub: HubFiles, data: DataConfig, num_classes: int
) -> dict[str, Any] | None:
    """Return the encoder card if foveal can train the named model and the weights have its sizes, else None."""
    try:
        meta_encoder = build_meta_encoder(name)
    except ConfigError:
        return None
    sizes = get_encoder_sizes(meta_encoder)
    if hub.num_heads not in (None, sizes["heads"]):
        raise ExportError(f"{file} has heads {hub.num_heads}, timm's {name} has {sizes['heads']}; they must be equal")
    pooling: Pooling = meta_encoder.global_pool
    if "fc_norm.weight" in weights and "norm.weight" not in weights:
        pooling = "avg"  # fine-tuned on the mean of the patches, as MAE's are
    if pooling not in get_args(Pooling):
        return None
    cfg = VitConfig(**sizes, name=name, positions="learned" if has_absolute_positions(meta_encoder) else None)

    def card_of(size: int | tuple[int, int]) -> dict[str, Any]:
        return encoder_card(cfg, size, data.channels, pooling=pooling, num_classes=num_classes)

    try:
        _check_weights_fit(encoder_from_card, card_of(data.image_size), weights, file, unchecked=("pos_embed",))
    except (ConfigError, ExportError):
        return None
    size, pos_embed = data.image_size, weights.get("pos_embed")
    if has_absolute_positions(meta_encoder) and pos_embed is not None and pos_embed.ndim == 3:
        num_prefix_tokens = meta_encoder.pos_embed.shape[1] - meta_encoder.patch_embed.num_patches
        size = _infer_image_size(pos_embed, num_prefix_tokens, sizes["patch"], name, hub, data)
    try:
        card = card_of(size)
        _check_weights_fit(encoder_from_card, card, weights, file)
    except (ConfigError, ExportError):
        return None
    return card


def infer_foreign_grid(
    table: Tensor,
    num_prefix_rows: int,
    patch: int,
    data_grid: tuple[int, int],
    name: str,
    hub: HubFiles,
    weights_version: int,
    source: Path,
) -> tuple[int, int]:
    """Return (rows, columns) of a position table beside ``hub`` files, as ``infer_patch_grid``; ``name`` is timm's.

    weights_version: 1 takes a table of as many patches as the data's grid as it is, and asks no file beside it.
    Raises: ExportError.
    """
    if weights_version == 1 and table.shape[1] - num_prefix_rows == math.prod(data_grid):
        return data_grid
    stated = [] if weights_version == 1 else [*hub.image_sizes(), get_pretrained_info(name).image_size]
    return infer_patch_grid(table, num_prefix_rows, patch, data_grid, stated, source)


def _infer_image_size(
    pos_embed: Tensor, num_prefix_tokens: int, patch: int, name: str, hub: HubFiles, data: DataConfig
) -> int | tuple[int, int]:
    """Return the image size that a position table is of (``infer_patch_grid``). Raises: ExportError if none is."""
    height, width = height_and_width(data.image_size)
    data_grid = (height // patch, width // patch)
    if data.weights_version == 1 and math.prod(data_grid) == pos_embed.shape[1] - num_prefix_tokens:
        return data.image_size  # which may be no multiple of the patch
    version = data.weights_version
    rows, columns = infer_foreign_grid(pos_embed, num_prefix_tokens, patch, data_grid, name, hub, version, hub.weights)
    return rows * patch if rows == columns else (rows * patch, columns * patch)


def _timm_backbone_card(
    path: Path, name: str, weights: dict[str, Tensor], hub: HubFiles, data: DataConfig, num_classes: int
) -> dict[str, Any]:
    """Return the card of an unmodified timm model, for the image size that the weights are of.

    Weights that do not depend on the image size are of the data's. Others are of the first of these whose shapes they
    have: the sizes of config.json, timm's, a square or the data's.
    Raises: ExportError that lists the mismatches, or if a square and data of another shape both fit.
    """
    timm_size = get_pretrained_info(name).image_size

    def check_fit(size: int | tuple[int, int]) -> dict[str, Any]:
        card = backbone_card(name, size, data.channels, num_classes)
        _check_weights_fit(backbone_from_card, card, weights, path)
        return card

    def fits(size: int | tuple[int, int]) -> bool:
        try:
            check_fit(size)
        except (ConfigError, ExportError):
            return False
        return True

    if data.weights_version == 1 or not find_weights_of_image_size(name, timm_size, data.channels):
        return check_fit(next(filter(fits, (data.image_size, timm_size)), timm_size))
    stated = next(filter(fits, (*hub.image_sizes(), timm_size)), None)
    if stated is not None:
        return check_fit(stated)
    guesses = dict.fromkeys(height_and_width(size) for size in (*_square_sizes(weights), data.image_size) if fits(size))
    if len(guesses) > 1:
        raise ambiguous_size_error(path, next(iter(guesses)), height_and_width(data.image_size))
    return check_fit(next(iter(guesses), timm_size))


def _square_sizes(weights: dict[str, Tensor]) -> list[int]:
    """Return the side of a square image with as many patches as the position table has, with at most two prefix rows."""
    pos_embed, embedding = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    if pos_embed is None or pos_embed.ndim != 3 or embedding is None:
        return []
    lengths = [pos_embed.shape[1] - num_prefix for num_prefix in range(3)]
    return [math.isqrt(n) * embedding.shape[-1] for n in lengths if n > 0 and math.isqrt(n) ** 2 == n]


def _check_weights_fit(
    build: Callable[[dict[str, Any], str], nn.Module],
    card: dict[str, Any],
    weights: dict[str, Tensor],
    path: Path,
    unchecked: tuple[str, ...] = (),
) -> None:
    """Check that weights fit the module of a card, built on the meta device. Raises: ExportError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = build(card, str(path))
    check_and_select_weights(module, weights, path, new_module_prefixes=unchecked, unused_prefixes=unchecked)


def _pixel_statistics(path: Path, name: str, hub: HubFiles, data: DataConfig) -> PixelStatistics:
    """Return mean and std of the pixels that the weights were trained on, one value per channel.

    The first of these that states them: the files beside the weights (``HubFiles.pixel_statistics``), data.mean and
    data.std, timm's description of the name.
    Raises: ExportError if none is of the data's channels, or if the files beside the weights state what is no number.
    """
    stated = (
        None if data.mean is None or data.std is None else PixelStatistics(data.mean, data.std, "data.mean, data.std")
    )
    beside = None
    try:
        beside = hub.pixel_statistics(data.weights_version)
    except StatisticsError as error:
        if stated is None:
            raise ExportError(f"{error}: set data.mean and data.std, of pixels in [0, 1]") from None
        stated = replace(stated, origin=f"{stated.origin} ({error})")
    timm_info = get_pretrained_info(name)
    timms = PixelStatistics(timm_info.mean, timm_info.std, f"timm's of {name}")
    candidates = [source.per_channel(data.channels) for source in (beside, stated) if source is not None]
    found = next((source for source in candidates if source is not None), None)
    if found is None and beside is None:
        found = timms.per_channel(data.channels)
    if found is None:
        raise ExportError(
            f"{path} does not say how its images of {data.channels} channels were normalised: set data.mean and "
            f"data.std"
        )
    return found


def _format(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
