"""The state dict that is meant among the objects of a training checkpoint."""

import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal.errors import ExportError
from foveal.weights.timm_names import holds_encoder

_MAX_DEPTH = 4  # of nested dicts; published checkpoints have at most two
_MAX_KEYS = 5  # of other entries that a note names


def select_state_dict(tree: Any, file: Path, model_names: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the one state dict with an encoder inside a checkpoint, and sentences about it for the plan.

    A checkpoint is a state dict, or nests one under a key such as model, state_dict or teacher. Equal state dicts count
    as one. ``model_names`` are the names of the model that is wanted. The tensors are copies.
    Raises: ExportError for none, for several that differ, and for tensors that are not whole.
    """
    state_dicts = dict(_find_state_dicts(tree, (), set()))
    if not state_dicts:
        raise ExportError(f"{file} holds no weights: {_describe(tree)}, and a dict of tensors by name is expected")
    encoders = {path: weights for path, weights in state_dicts.items() if holds_encoder(weights, model_names)}
    first, *others = encoders or [max(state_dicts, key=lambda path: _count_values(state_dicts[path]))]
    if any(not _are_equal(encoders[first], encoders[path]) for path in others):
        raise _several_encoders_error(file, list(encoders))
    weights = {name: _copy_whole(name, value, file) for name, value in state_dicts[first].items()}
    notes = [f"weights are those under {_name(first)} of the file"] if first else []
    if others:
        notes = [f"weights are those under {' and '.join(map(_name, encoders))} of the file, which are equal"]
    used = {path[0] for path in encoders if path} | ({first[0]} if first else set(weights))
    unused = [str(key) for key in tree if key not in used]
    if unused:
        more = f" and {len(unused) - _MAX_KEYS} more" if len(unused) > _MAX_KEYS else ""
        notes.append(f"not read from the file: {', '.join(unused[:_MAX_KEYS])}{more}")
    return weights, notes


def read_flat_state_dict(tree: Any, file: Path) -> dict[str, Tensor]:
    """Return a file's state dict, which is not nested: a part of weights in several files. Raises: ExportError."""
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise ExportError(f"{file} is no part of weights: {_describe(tree)}, and a dict of tensors by name is expected")
    return {name: _copy_whole(name, value, file) for name, value in tree.items() if isinstance(value, Tensor)}


def _find_state_dicts(
    tree: Any, path: tuple[str, ...], visited: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the dicts with tensors by name, with their path of keys; the outer before the inner."""
    if not isinstance(tree, dict) or len(path) > _MAX_DEPTH or id(tree) in visited:
        return
    visited.add(id(tree))
    named = {name: value for name, value in tree.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for name, value in named.items():
        yield from _find_state_dicts(value, (*path, name), visited)


def _are_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def _count_values(weights: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in weights.values())


def _copy_whole(name: str, value: Tensor, file: Path) -> Tensor:
    """Return a copy of a dense tensor, which holds no mapping of the file. Raises: ExportError for any other tensor."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_meta:
        raise ExportError(
            f"{file} has {name} as a {type(value).__name__} of layout {value.layout}, which is no whole dense tensor; "
            f"gather and save the weights whole"
        )
    return value.detach().clone()


def _several_encoders_error(file: Path, paths: list[tuple[str, ...]]) -> ExportError:
    """Return the refusal of encoders that differ, with the command that keeps one of them."""
    names = ", ".join(map(_name, paths))
    keys = "".join(f"[{key!r}]" for key in paths[-1])
    target = file.with_name(f"{file.stem}.{'.'.join(paths[-1])}.pth")
    program = (
        f"import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
        f"torch.save(torch.load({str(file)!r}, 'cpu', weights_only=True){keys}, {str(target)!r})"
    )
    return ExportError(
        f"{file} holds {len(paths)} encoders ({names}); save the one that is meant into a file of its own, for example by "
        f"python -c {shlex.quote(program)}"
    )


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path) or "no key"


def _describe(tree: Any) -> str:
    """Return what a file holds, in a few words."""
    if isinstance(tree, dict):
        return f"it has {', '.join(map(str, list(tree)[:_MAX_KEYS])) or 'no entries'}"
    return f"it is a {type(tree).__name__}"
