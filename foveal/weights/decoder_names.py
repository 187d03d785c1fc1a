"""foveal's names for the decoder of a masked autoencoder of others: MAE's reference code, Hugging Face's ViTMAE.

Their decoders compute what ``foveal.models.mae.Decoder`` does, but for the order of a patch's predicted pixels.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from foveal.errors import ExportError
from foveal.weights.hugging_face_names import rename_hugging_face_layers
from foveal.weights.position_grid import is_sincos_table
from foveal.weights.weight_lists import list_weights

DECODER_PREFIXES = ("decoder", "mask_token")
_POSITIONS = "decoder_pos_embed"
_MODULES = {"decoder_embed": "embed", "decoder_norm": "norm", "decoder_pred": "predict"}
# In files that transformers 5 writes the name is decoder_encoder.layer, by a rule that is meant for encoders.
_HF_LAYER = re.compile(r"decoder_(?:layers|encoder\.layer)\.(\d+)\.(.+)")
_POSITION_TOLERANCE = 1e-4  # of the class token's row, which is 0 in published weights


def rename_decoder(
    weights: Mapping[str, Tensor], patch: int, channels: int, grid: tuple[int, int], source: Path
) -> dict[str, Tensor]:
    """Return the decoder among the weights of a file as ``decoder.`` and the names of ``foveal.models.mae.Decoder``.

    ``weights`` are those of ``read_weights_as_timm``, which leaves the names of decoders as they are. ``grid``: rows and
    columns of the patches of the images that the weights were trained on.
    Raises: ExportError without a decoder, for names of decoders that are not translated, and for learned positions.
    """
    own = {name.removeprefix("decoder."): value for name, value in weights.items() if name.startswith(DECODER_PREFIXES)}
    if "decoder_embed.weight" not in own:
        raise ExportError(
            f"{source} holds no decoder under the names of MAE's code or of Hugging Face's ViTMAE; leave init_decoder out"
        )
    _check_positions(own.pop(_POSITIONS, None), grid, source)
    renamed, unknown = rename_hugging_face_layers(own, _HF_LAYER, source)
    for name, value in own.items():
        module, _, rest = name.partition(".")
        if module in _MODULES:
            renamed[f"{_MODULES[module]}.{rest}"] = value
        elif module == "decoder_blocks":
            renamed[f"blocks.{rest}"] = value
        elif name == "mask_token":
            renamed[name] = value
        elif _HF_LAYER.fullmatch(name) is None:
            unknown.append(name)
    if unknown:
        listed = list_weights({name: own[name] for name in unknown})
        raise ExportError(f"{source} has a decoder with names that are not translated: {listed}")
    for name in {"predict.weight", "predict.bias"} & renamed.keys():
        renamed[name] = _reorder_pixels(renamed[name], patch, channels)
    return {f"decoder.{name}": value for name, value in renamed.items()}


def _check_positions(table: Tensor | None, grid: tuple[int, int], source: Path) -> None:
    """Check that positions [1, 1 + L, E] are the formula's, with none for the class token. Raises: ExportError."""
    if table is None:
        return
    num_rows = grid[0] * grid[1] + 1
    is_formula = table.ndim == 3 and table.shape[1] == num_rows and is_sincos_table(table, grid)
    if not is_formula or bool(table[:, 0].abs().max() > _POSITION_TOLERANCE):
        raise ExportError(
            f"{source} has {_POSITIONS} {list(table.shape)}, which are not the sine-cosine positions of {grid[0]} x "
            f"{grid[1]} patches, and foveal's decoder has those alone; leave init_decoder out"
        )


def _reorder_pixels(value: Tensor, patch: int, channels: int) -> Tensor:
    """Return predictions' weights [rows * columns * C, ...] in foveal's order [C * rows * columns, ...].

    Weights of another number of values stay as they are, to be listed with their shape.
    """
    if value.shape[0] != patch * patch * channels:
        return value
    return torch.movedim(value.unflatten(0, (patch, patch, channels)), 2, 0).flatten(0, 2)
