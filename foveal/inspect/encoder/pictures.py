"""The pictures of an encoder, each with what it shows in words. B images, C channels, H heads, L patches."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from foveal.inspect.encoder.attention import AttentionMeter
from foveal.inspect.encoder.charts import draw_activation_chart, draw_attention_chart
from foveal.inspect.encoder.measure import EncoderMeasurements, measure_encoder
from foveal.inspect.encoder.principal_components import compute_position_share, project_to_colors
from foveal.inspect.image_grid import GAP, MAX_SHEET_SIDE, MIN_IMAGE_SIDE, draw_image_grid
from foveal.inspect.picture import Picture

MAX_IMAGES = 8
_MAX_HEADS = 16  # columns of a picture
_TENTH = 0.1  # of the patches: the part whose share of the attention is said
_SATURATED = 0.98  # quantile of a map that has the brightest colour: a few patches may get far more than all others


def draw_encoder_pictures(
    encoder: Any,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    *,
    captions: Sequence[str] = (),
) -> Iterator[tuple[str, Picture]]:
    """Yield pictures of an encoder in evaluation mode, on the device, each with the name of its file.

    ``images`` uint8 [B, C, H, W], of which the first eight are shown; ``mean`` and ``std`` are of pixels in [0, 1];
    ``captions``: a name per image. Pictures of what the encoder does not have are left out, and the last picture says so.
    Raises: ExportError if a layer's output is not finite.
    """
    images = images[:MAX_IMAGES]
    measured = measure_encoder(encoder, images, mean, std, device)
    shown, notes = _to_shown(images), _describe_images(images, captions[:MAX_IMAGES])
    if measured.features:
        yield "features", _draw_features(shown, measured.features, notes)
    if measured.attention is not None:
        yield "attention", _draw_attention(shown, measured.attention, notes)
        yield "attention-distance", _draw_attention_distance(measured.attention)
    if measured.activations:
        yield "activations", _draw_activations(measured, len(images))


def _draw_features(shown: Tensor, features: dict[str, Tensor], notes: Sequence[str]) -> Picture:
    columns, sentences = {"image": shown}, []
    for name, feature_map in features.items():
        colors, shares = project_to_colors(feature_map)
        columns[f"{name}: {_percent(sum(shares))} of the variance"] = _enlarge(colors, shown)
        parts = ", ".join(_percent(share) for share in shares)
        sentence = f"In {name} they hold {_percent(sum(shares))} of the variance ({parts})"
        position = compute_position_share(feature_map)
        if position is not None:
            sentence += f"; {_percent(position)} of the variance depends on the position only"
        sentences.append(f"{sentence}.")
    how = "First three principal components of the features, of all these images together, as red, green and blue."
    reading = "Within a column, like colours are like features."
    picture = _draw_grid(columns, "Features of the patches as colours", (how, reading, *notes))
    return Picture(picture, "Features of the patches", _describe([how, *sentences, reading], columns, notes))


def _draw_attention(shown: Tensor, attention: AttentionMeter, notes: Sequence[str]) -> Picture:
    maps_BHN, rollout_BN = torch.stack(attention.head_maps), torch.stack(attention.rollouts)
    num_heads, prefix = maps_BHN.shape[1], attention.num_prefix
    peaks = [_share_of_tenth(maps_BHN[:, head, prefix:]) for head in range(num_heads)]
    rollout_peak = _share_of_tenth(rollout_BN[:, prefix:])
    columns = {
        "image": shown,
        f"rollout, {_percent(rollout_peak)}": _to_relief(rollout_BN[:, prefix:], attention, shown),
    }
    heads = sorted(set(np.linspace(0, num_heads - 1, min(num_heads, _MAX_HEADS)).round().astype(int).tolist()))
    for head in heads:
        columns[f"head {head + 1}, {_percent(peaks[head])}"] = _to_heat_maps(
            maps_BHN[:, head, prefix:], attention, shown
        )
    query = "of the class token" if attention.has_class_token else "of all patches, averaged,"
    how = f"Attention {query} to the patches in block {attention.num_blocks}, the last. Black: none; yellow: the most of a "
    how += "map, twice an even share or more. Rollout: from its least to its most."
    num_patches = rollout_BN.shape[1] - prefix
    even = _percent(_count_tenth(num_patches) / num_patches)
    reading = f"Percentages: attention to the tenth of the patches that gets most; {even} if all patches got the same."
    highest, lowest = int(np.argmax(peaks)), int(np.argmin(peaks))
    course = (
        f"Head {highest + 1} gives {_percent(peaks[highest])} of its attention to a tenth of the patches, "
        f"head {lowest + 1} gives {_percent(peaks[lowest])}, rollout, which multiplies the attention of all blocks, "
        f"{_percent(rollout_peak)}; even attention would give {even}."
    )
    sentences = [how, course]
    if prefix:
        tokens = "the class token itself" if prefix == 1 else "class token and registers"
        stays = float(maps_BHN[:, :, :prefix].sum(2).mean())
        sentences.append(f"{_percent(stays)} of the attention, over all heads, is on {tokens}.")
    if len(heads) < num_heads:
        notes = [f"{len(heads)} of {num_heads} heads are shown.", *notes]
    picture = _draw_grid(columns, "Attention of the last block, by head", (how, reading, *notes))
    return Picture(picture, "Attention of the last block", _describe(sentences, columns, notes))


def _draw_attention_distance(attention: AttentionMeter) -> Picture:
    distances, entropies = np.mean(attention.distances, axis=0), np.mean(attention.entropies, axis=0)
    uniform, uniform_entropy = attention.uniform_distance(), float(np.log(attention.num_tokens))
    means, mean_entropies, last = distances.mean(1), entropies.mean(1), len(distances)
    form = ".0f" if uniform >= 20 else ".1f"  # pixels
    nearest, farthest = (np.unravel_index(choose(distances), distances.shape) for choose in (np.argmin, np.argmax))
    text = (
        f"{_describe_course('Mean attention distance', means, 'px', form)}; uniform attention would reach {uniform:{form}} px. "
        f"The shortest is {distances.min():{form}} px (head {nearest[1] + 1} of block {nearest[0] + 1}), the longest "
        f"{distances.max():{form}} px (head {farthest[1] + 1} of block {farthest[0] + 1}). "
        f"{_describe_course('Mean entropy', mean_entropies, 'nats', '.2f')}; uniform attention has {uniform_entropy:.2f} nats. "
        f"Two charts, one point per head, over {last} block{'s' * (last > 1)} and {len(attention.distances)} "
        f"image{'s' * (len(attention.distances) > 1)}."
    )
    image = draw_attention_chart(distances, entropies, uniform, uniform_entropy)
    return Picture(image, "Attention distance and entropy", text)


def _draw_activations(measured: EncoderMeasurements, num_images: int) -> Picture:
    meters = measured.activations
    most, least = max(meters, key=lambda meter: meter.rms), min(meters, key=lambda meter: meter.rms)
    extreme = max(meters, key=lambda meter: meter.largest())
    if len(meters) == 1:
        text = f"The root mean square of the output of {most.name} is {most.rms:.3g}. "
    else:
        text = (
            f"The layer that activates most is {most.name}: the root mean square of its output is {most.rms:.3g}, that of "
            f"{least.name}, the least active, {least.rms:.3g}. "
        )
    text += f"The largest value, {extreme.largest():.3g}, is in {extreme.name}. "
    known = {meter.name: meter.variation for meter in meters if meter.variation is not None}
    if known:
        high, low = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
        text += (
            f"From image to image {high} changes most: the standard deviation over images, at the same place and channel, "
            f"is {_percent(known[high])} of its root mean square"
        )
        text += f", and {_percent(known[low])} in {low}, which changes least. " if high != low else ". "
    text += f"Charts over {len(meters)} layer{'s' * (len(meters) > 1)} and {num_images} image{'s' * (num_images > 1)}: "
    text += "distribution of the values, root mean square" + (", deviation between images." if known else ".")
    return Picture(draw_activation_chart(meters), "Activations", " ".join((text, *measured.missing)))


def _to_shown(images: Tensor) -> Tensor:
    """Return images that can be drawn, uint8 [B, 1 or 3, H, W], of images of any number of channels.

    Large images are reduced, so that a sheet has room for all of them.
    """
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    height, width = shown.shape[2:]
    reduction = _row_height(len(shown)) / height
    if reduction >= 1:
        return shown
    size = max(1, int(height * reduction)), max(1, int(width * reduction))
    return (
        F.interpolate(shown.float(), size=size, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)
    )


def _row_height(num_images: int) -> int:
    """Return the pixels of an image's height for which all images fit on a sheet."""
    return (MAX_SHEET_SIDE + GAP) // num_images - GAP


def _draw_grid(columns: dict[str, Tensor], title: str, notes: Sequence[str]) -> Image.Image:
    """Draw all images on a sheet; small ones are enlarged unless some would be left out."""
    num_images, _, height, width = columns["image"].shape
    enlarged = height * -(-MIN_IMAGE_SIDE // max(height, width))
    min_side = MIN_IMAGE_SIDE if enlarged <= _row_height(num_images) else 1
    return draw_image_grid(columns, title=title, notes=notes, min_side=min_side)


def _describe_images(images: Tensor, captions: Sequence[str]) -> list[str]:
    """Return sentences on what the rows of a picture are."""
    sentences = []
    if captions:
        rows = "Rows, from the top" if len(captions) > 1 else "Image"
        sentences.append(f"{rows}: {'; '.join(' '.join(caption.split()) for caption in captions)}.")
    num_channels = images.shape[1]
    if num_channels == 2 or num_channels > 3:
        which = "the first" if num_channels == 2 else "the first three"
        sentences.append(f"Of {num_channels} channels, the images show {which}.")
    return sentences


def _describe(sentences: Sequence[str], columns: dict[str, Tensor], notes: Sequence[str]) -> str:
    num_rows = len(columns["image"])
    rows = f"{num_rows} rows, one per image" if num_rows > 1 else "One row"
    names = ", ".join(re.split("[:,]", name)[0] for name in columns)
    return " ".join((*sentences, f"{rows}; columns: {names}.", *notes))


def _describe_course(what: str, values: np.ndarray, unit: str, form: str) -> str:
    """Return a sentence on values by block, without its end."""
    first, last = float(values[0]), float(values[-1])
    if len(values) == 1:
        return f"{what} is {first:{form}} {unit} in block 1"
    if f"{first:{form}}" == f"{last:{form}}":
        return f"{what} is {first:{form}} {unit} in block 1 and in block {len(values)}"
    verb = "rises" if last > first else "falls"
    return f"{what} {verb} from {first:{form}} {unit} in block 1 to {last:{form}} {unit} in block {len(values)}"


def _share_of_tenth(weights_BL: Tensor) -> float:
    """Return the share of the attention to patches that a tenth of them gets, the most attended, as the images' mean."""
    top = weights_BL.topk(_count_tenth(weights_BL.shape[1]), dim=1).values.sum(1)
    return float((top / weights_BL.sum(1).clamp_min(torch.finfo(torch.float32).tiny)).mean())


def _count_tenth(num_patches: int) -> int:
    return max(1, round(_TENTH * num_patches))


def _to_heat_maps(weights_BL: Tensor, attention: AttentionMeter, shown: Tensor) -> Tensor:
    """Return weights as colours uint8 [B, 3, H, W].

    The scale of a map begins at 0 and ends at twice an even share or beyond, so that even attention looks even.
    """
    even = weights_BL.mean(1, keepdim=True)
    return _to_colors(
        weights_BL, torch.zeros_like(even), torch.maximum(_find_high(weights_BL), 2 * even), attention, shown
    )


def _to_relief(weights_BL: Tensor, attention: AttentionMeter, shown: Tensor) -> Tensor:
    """Return weights as colours uint8 [B, 3, H, W], from the least to the most of a map: rollout is never far from even."""
    return _to_colors(weights_BL, weights_BL.amin(1, keepdim=True), _find_high(weights_BL), attention, shown)


def _find_high(weights_BL: Tensor) -> Tensor:
    return torch.quantile(weights_BL, _SATURATED, dim=1, keepdim=True)


def _to_colors(weights_BL: Tensor, low: Tensor, high: Tensor, attention: AttentionMeter, shown: Tensor) -> Tensor:
    scaled = ((weights_BL - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).unflatten(1, attention.grid_hw)
    colors = mpl.colormaps["inferno"](scaled.numpy(), bytes=True)[..., :3]
    return _enlarge(torch.from_numpy(np.ascontiguousarray(colors)).permute(0, 3, 1, 2), shown)


def _enlarge(colors: Tensor, shown: Tensor) -> Tensor:
    """Return maps uint8 [B, 3, rows, columns] in the size of the images, without smoothing."""
    return F.interpolate(colors, size=shown.shape[2:], mode="nearest-exact")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
