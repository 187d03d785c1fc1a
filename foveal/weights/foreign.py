"""Encoder weights that foveal did not write: safetensors under timm's names, or Hugging Face's of ViT and ViTMAE.

Nothing is fetched and no pickle is read.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveal.atomic import sha256
from foveal.errors import ExportError
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout

# Hugging Face's names behind "vit.", before transformers 5 and since; what the files of both hold is the older.
_TOP_LEVEL_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_QKV_INDEX = {"query": 0, "q_proj": 0, "key": 1, "k_proj": 1, "value": 2, "v_proj": 2}


def find_weights_file(path: Path, timeout_seconds: float = DEFAULT_STALL_TIMEOUT) -> Path:
    """The safetensors file that is meant: the place itself, or the one in it.

    patience: seconds that storage may stand still. Raises: ExportError, Unreachable.
    """
    return read_with_timeout(path, timeout_seconds, lambda: _find_weights_file(path))


def _find_weights_file(path: Path) -> Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        found = sorted(each.name for each in path.iterdir() if each.is_file())
        raise ExportError(
            f"{path} has no model.safetensors (it has {', '.join(found[:5]) or 'no files'}); weights are read from "
            f"safetensors alone, no pickle and no parts of one"
        )
    if not file.exists():
        raise ExportError(f"{path} is not there: give an export, or a file or folder with weights as safetensors")
    if file.suffix != ".safetensors":
        raise ExportError(f"{file} is no safetensors file; a pickle is not read: convert it with safetensors.torch")
    return file


def read_weights_as_timm(file: Path, timeout_seconds: float = DEFAULT_STALL_TIMEOUT) -> tuple[dict[str, Tensor], str]:
    """The weights of a file, fp32 on the CPU, under timm's names where they have one, and the file's sha256.

    patience: seconds that storage may stand still. Raises: ExportError, Unreachable.
    """
    try:
        digest = read_with_timeout(file, timeout_seconds, lambda: sha256(file))
        weights = read_with_timeout(file, timeout_seconds, lambda: load_file(file))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None
    return _to_timm_names({name: value.float() for name, value in weights.items()}), digest


def read_hf_config(weights_path: Path, timeout_seconds: float = DEFAULT_STALL_TIMEOUT) -> dict[str, Any]:
    """What Hugging Face's config.json in the same folder says, and weights do not; nothing where there is none.

    Raises: Unreachable where it does not answer for ``patience`` seconds.
    """
    config = weights_path.parent / "config.json"
    try:
        told: Any = read_with_timeout(config, timeout_seconds, lambda: json.loads(config.read_text()))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def read_num_heads(weights_path: Path, timeout_seconds: float = DEFAULT_STALL_TIMEOUT) -> int | None:
    """The attention heads that the config.json states: no weight tells of them. Raises: Unreachable."""
    heads = read_hf_config(weights_path, timeout_seconds).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _to_timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names as timm's: queries, keys and values are one matrix there."""
    if not any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in weights):
        return weights
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, value in weights.items():
        plain = name.removeprefix("vit.")
        layer = _LAYER.fullmatch(plain)
        stem, _, kind = plain.rpartition(".")
        if layer and layer[2] in _LAYER_NAMES:
            found[f"blocks.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"] = value
        elif layer and (third := _QKV_INDEX.get(layer[2].rpartition(".")[2])) is not None:
            thirds.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[third] = value
        elif plain in _TOP_LEVEL_NAMES:
            found[_TOP_LEVEL_NAMES[plain]] = value
        else:
            found[f"{_TOP_LEVEL_NAMES[stem]}.{kind}" if stem in _TOP_LEVEL_NAMES else name] = value
    whole = {name: torch.cat([parts[0], parts[1], parts[2]]) for name, parts in thirds.items() if len(parts) == 3}
    return found | whole
