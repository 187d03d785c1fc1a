"""Encoder weights from other libraries: safetensors under timm's names, or Hugging Face's names of ViT and ViTMAE.

Nothing is downloaded and no pickle is read.
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

# Hugging Face's names after "vit.", before transformers 5 and since; files of both versions hold the older names.
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


def find_weights_file(path: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> Path:
    """Return the safetensors file: the path itself, or ``model.safetensors`` in the folder.

    stall_timeout: limit for storage without progress. Raises: ExportError, StorageUnreachableError.
    """
    return read_with_timeout(path, stall_timeout, lambda: _find_weights_file(path))


def _find_weights_file(path: Path) -> Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        raise ExportError(
            f"{path} has no model.safetensors (it has {', '.join(names[:5]) or 'no files'}); weights are read from "
            f"safetensors alone, no pickle and no parts of one"
        )
    if not file.exists():
        raise ExportError(f"{path} is not there: give an export, or a file or folder with weights as safetensors")
    if file.suffix != ".safetensors":
        raise ExportError(f"{file} is no safetensors file; a pickle is not read: convert it with safetensors.torch")
    return file


def read_weights_as_timm(file: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> tuple[dict[str, Tensor], str]:
    """Return the weights of a file (fp32, CPU), under timm's names where these exist, and the file's sha256.

    stall_timeout: limit for storage without progress. Raises: ExportError, StorageUnreachableError.
    """
    try:
        digest = read_with_timeout(file, stall_timeout, lambda: sha256(file))
        weights = read_with_timeout(file, stall_timeout, lambda: load_file(file))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None
    return _to_timm_names({name: value.float() for name, value in weights.items()}), digest


def read_hf_config(weights_path: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> dict[str, Any]:
    """Return Hugging Face's config.json in the weights' folder; empty if it is missing or invalid.

    stall_timeout: limit for storage without progress. Raises: StorageUnreachableError.
    """
    file = weights_path.parent / "config.json"
    try:
        hf_config: Any = read_with_timeout(file, stall_timeout, lambda: json.loads(file.read_text()))
    except (OSError, ValueError, RecursionError):
        return {}
    return hf_config if isinstance(hf_config, dict) else {}


def read_num_heads(weights_path: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> int | None:
    """Return config.json's number of attention heads, which weights do not show. Raises: StorageUnreachableError."""
    heads = read_hf_config(weights_path, stall_timeout).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _to_timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename Hugging Face's weights to timm's names; timm has queries, keys and values in one matrix."""
    if not any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in weights):
        return weights
    renamed: dict[str, Tensor] = {}
    qkv_parts: dict[str, dict[int, Tensor]] = {}
    for name, value in weights.items():
        plain = name.removeprefix("vit.")
        layer = _LAYER.fullmatch(plain)
        stem, _, suffix = plain.rpartition(".")
        if layer and layer[2] in _LAYER_NAMES:
            renamed[f"blocks.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"] = value
        elif layer and (index := _QKV_INDEX.get(layer[2].rpartition(".")[2])) is not None:
            qkv_parts.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[index] = value
        elif plain in _TOP_LEVEL_NAMES:
            renamed[_TOP_LEVEL_NAMES[plain]] = value
        else:
            renamed[f"{_TOP_LEVEL_NAMES[stem]}.{suffix}" if stem in _TOP_LEVEL_NAMES else name] = value
    qkv = {name: torch.cat([parts[0], parts[1], parts[2]]) for name, parts in qkv_parts.items() if len(parts) == 3}
    return renamed | qkv
