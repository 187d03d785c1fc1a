"""Measures an encoder on a few images, one at a time. B images, C channels, D width."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.data.image.transforms import normalise
from foveal.errors import ExportError
from foveal.inspect.encoder.activations import ActivationMeter
from foveal.inspect.encoder.attention import AttentionMeter, recorded_attention
from foveal.inspect.encoder.layers import (
    captured_outputs,
    find_layers,
    has_class_token,
    has_patch_tokens,
    to_feature_map,
)

_MAX_DEPTHS = 3  # whose features are kept
_MAX_PLACES = 64  # rows, and columns, of a map that is kept


@dataclass(frozen=True)
class EncoderMeasurements:
    """What a few images show of an encoder.

    features: maps [B, D, rows, columns] by the name of their layer, of several depths; the last one is after the last
    norm. attention: None for an encoder whose blocks do not attend to all patches.
    """

    features: dict[str, Tensor]
    attention: AttentionMeter | None
    activations: tuple[ActivationMeter, ...]
    missing: tuple[str, ...]  # sentences on what the encoder has nothing of


@torch.no_grad()
def measure_encoder(
    encoder: Any, images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> EncoderMeasurements:
    """Measure an encoder in evaluation mode, on the device, on images uint8 [B, C, H, W].

    ``mean`` and ``std`` are of pixels in [0, 1]. The encoder is not changed.
    Raises: ExportError if a layer's output is not finite.
    """
    layers = find_layers(encoder)
    meters = {name: ActivationMeter(name) for name in layers}
    attention = _make_attention_meter(encoder)
    kept = _choose_depths(list(layers))
    maps: dict[str, list[Tensor]] = {}
    for image in images:
        inputs = normalise(image[None].to(device), mean, std)
        with ExitStack() as stack:
            outputs = stack.enter_context(captured_outputs(layers))
            if attention is not None:
                stack.enter_context(recorded_attention(list(layers.values()), attention.add))
            last = encoder.forward_features(inputs)
        if attention is not None:
            attention.end_image()
        for name, output in outputs.items():
            if not bool(output.isfinite().all()):
                raise ExportError(f"{name} of the encoder gives values that are not finite: nothing can be shown")
            meters[name].add(output)
        for name in kept:
            feature_map = to_feature_map(encoder, last if name == kept[-1] else outputs.get(name, last))
            if feature_map is not None:
                maps.setdefault(name, []).append(_reduce_map(feature_map.float()).cpu())
    return _collect(maps, attention, [meter for meter in meters.values() if meter.mean_squares])


def _make_attention_meter(encoder: Any) -> AttentionMeter | None:
    if not has_patch_tokens(encoder):
        return None
    return AttentionMeter(
        encoder.patch_embed.grid_size,
        encoder.patch_embed.patch_size,
        encoder.num_prefix_tokens,
        len(encoder.blocks),
        has_class_token(encoder),
    )


def _choose_depths(names: Sequence[str]) -> list[str]:
    """Return up to three layers at equal distances, with the last one."""
    positions = [-(-len(names) * number // _MAX_DEPTHS) - 1 for number in range(1, _MAX_DEPTHS + 1)]
    return [names[position] for position in sorted({position for position in positions if position >= 0})]


def _reduce_map(feature_map: Tensor) -> Tensor:
    """Return a map [B, D, rows, columns] of at most 64 x 64 places, means of what they replace: pictures show no more."""
    rows, columns = feature_map.shape[2:]
    if max(rows, columns) <= _MAX_PLACES:
        return feature_map
    return F.adaptive_avg_pool2d(feature_map, (min(rows, _MAX_PLACES), min(columns, _MAX_PLACES)))


def _collect(
    maps: dict[str, list[Tensor]], attention: AttentionMeter | None, meters: Sequence[ActivationMeter]
) -> EncoderMeasurements:
    missing = []
    if attention is None:
        missing.append("The encoder is no plain vision transformer: it has no attention between all patches to show.")
    elif attention.problem:
        missing.append(f"There is no attention to show of this encoder: {attention.problem}.")
        attention = None
    if not maps:
        missing.append("The encoder makes no map of features, so that its features have no picture.")
    features = {name: torch.cat(rows) for name, rows in maps.items()}
    return EncoderMeasurements(features, attention, tuple(meters), tuple(missing))
