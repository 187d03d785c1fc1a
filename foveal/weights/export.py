"""Exports: ``model.safetensors`` under timm's names and ``card.json``, the interface between stages.

The card holds what the weights do not: architecture, grid and position type, mean and standard deviation of pixels,
pooling, class names and provenance. A head that is not timm's is stored in ``head.safetensors``, so that every export
is an encoder for the next stage. ``config.json`` and ``README.md`` are for others; foveal reads neither of an export.
No pickle is read from an export.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from foveal.atomic import atomic_folder, encode_json, sha256
from foveal.errors import ExportError
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout
from foveal.weights.card import EXPORT_FORMAT, Card
from foveal.weights.hub_files import CONFIG
from foveal.weights.model_card import README, build_model_card
from foveal.weights.model_card_facts import NO_FACTS, ModelCardFacts
from foveal.weights.timm_folder import build_timm_config, explain_encoder_not_timm
from foveal.weights.weight_lists import list_first, list_weights
from foveal.weights.weights_file import write_weights

_TUPLE_FIELDS = ("mean", "std", "classes", "resized_from")  # lists in JSON
_MODEL, _HEAD = "model.safetensors", "head.safetensors"


def write_export(
    folder: Path,
    weights: dict[str, Tensor],
    card: Card,
    head_weights: dict[str, Tensor] | None = None,
    facts: ModelCardFacts = NO_FACTS,
) -> None:
    """Write an export atomically.

    ``head_weights`` belong to the head that ``card.head`` describes; ``facts`` are for README.md (``describe_export``).
    """
    assert (head_weights is None) == (card.head is None)
    with atomic_folder(folder) as draft:
        fields = asdict(card) | {"sha256": _write_and_hash(draft / _MODEL, weights)}
        if head_weights is None:
            del fields["head"], fields["head_sha256"]
        else:
            fields["head_sha256"] = _write_and_hash(draft / _HEAD, head_weights)
        (draft / "card.json").write_bytes(encode_json(fields))
        describe_export(draft, card, facts)


def describe_export(folder: Path, card: Card, facts: ModelCardFacts) -> None:
    """Write what others read of an export into its draft: timm's config.json, and README.md for people.

    There is no config.json if timm cannot build the encoder (``explain_encoder_not_timm``); README.md says why.
    """
    if explain_encoder_not_timm(card) is None:
        (folder / CONFIG).write_bytes(encode_json(build_timm_config(card)))
    (folder / README).write_bytes(build_model_card(card, facts).encode())


def filter_and_strip_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights under a name prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def read_card(folder: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> Card:
    """Read the card of an export; ``stall_timeout``: limit for storage without progress.

    Raises: ExportError for a missing or invalid card or another format; StorageUnreachableError.
    """
    file = folder / "card.json"
    try:
        fields: dict[str, Any] = read_with_timeout(file, stall_timeout, lambda: json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        exports = sorted(file.parent.name for file in folder.glob("*/card.json"))
        hint = f"one of the exports in it ({', '.join(exports)})" if exports else "the export folder of a finished run"
        raise ExportError(f"{folder} is no export: it has no card.json; give {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None
    if not isinstance(fields, dict) or fields.get("format") != EXPORT_FORMAT:
        export_format = fields.get("format") if isinstance(fields, dict) else None
        raise ExportError(f"{folder} has export format {export_format}; this foveal reads format {EXPORT_FORMAT}")
    try:
        tuples: dict[str, Any] = {
            name: tuple(value) for name, value in fields.items() if name in _TUPLE_FIELDS and isinstance(value, list)
        }
        return Card(**fields | tuples)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        field_path = ".".join(str(part) for part in detail["loc"])
        raise ExportError(
            f"{file} is not as foveal wrote it ({field_path!r}: {detail['msg']}); export it again"
        ) from None


def read_export(folder: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> tuple[dict[str, Tensor], Card]:
    """Read the weights (fp32, CPU) and the card of an export, and verify the digest.

    ``stall_timeout`` as in ``read_card``. Raises: ExportError for an incomplete or altered export;
    StorageUnreachableError.
    """
    card = read_card(folder, stall_timeout)
    return _read_weights(folder / _MODEL, card.sha256, stall_timeout), card


def read_head(folder: Path, expected_kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights (fp32, CPU) of an export's head, verify the digest, and return them with ``card.head``.

    Raises: ExportError for an incomplete or altered export, or for a head of another kind.
    """
    card = read_card(folder)
    head_kind = None if card.head is None else card.head.get("kind")
    if card.head is None or head_kind != expected_kind:
        head = f"a head for {head_kind}" if head_kind else "no head"
        raise ExportError(f"{folder} has {head}, and one for {expected_kind} is wanted")
    return _read_weights(folder / _HEAD, card.head_sha256, DEFAULT_STALL_TIMEOUT), card.head


def _write_and_hash(file: Path, weights: dict[str, Tensor]) -> str:
    write_weights(file, weights)
    return sha256(file)


def _read_weights(file: Path, digest: str, timeout_seconds: float) -> dict[str, Tensor]:
    def read() -> dict[str, Tensor]:
        if sha256(file) != digest:
            raise ExportError(f"{file} is not the file that its card describes (sha256 differs); export it again")
        return load_file(file)

    try:
        weights = read_with_timeout(file, timeout_seconds, read)
    except FileNotFoundError:
        raise ExportError(f"{file.parent} is no whole export: {file.name} is missing") from None
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None
    check_finite(weights, file)
    return weights


def check_finite(weights: dict[str, Tensor], file: Path) -> None:
    """Check that no weight is NaN or infinite. Raises: ExportError with the first one."""
    # The sum of a finite tensor is finite unless it overflows, and takes no memory: most tensors need no second look.
    for name, value in weights.items():
        if not value.sum(dtype=torch.float64).isfinite() and not value.isfinite().all():
            raise ExportError(
                f"{file} has {name} with {int((~value.isfinite()).sum())} of {value.numel()} values that are NaN or "
                f"infinite; give the weights of a step before the training diverged"
            )


def load_weights_strict(
    module: nn.Module,
    weights: dict[str, Tensor],
    source: Path,
    *,
    new_module_prefixes: Sequence[str] = (),
    unused_prefixes: Sequence[str] = (),
) -> None:
    """Load weights into a module; names and shapes must match as in ``check_and_select_weights``."""
    module.load_state_dict(
        module.state_dict()
        | check_and_select_weights(
            module, weights, source, new_module_prefixes=new_module_prefixes, unused_prefixes=unused_prefixes
        )
    )


def check_and_select_weights(
    module: nn.Module,
    weights: dict[str, Tensor],
    source: Path,
    *,
    new_module_prefixes: Sequence[str] = (),
    unused_prefixes: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return the weights that a module takes; all names and shapes must match, with two exceptions.

    Module names under ``new_module_prefixes`` keep their initial values; weights under ``unused_prefixes`` may be left over.
    Raises: ExportError that lists the mismatches.
    """
    own = module.state_dict()
    missing = {n: v for n, v in own.items() if n not in weights and not n.startswith(tuple(new_module_prefixes))}
    extra = {n: v for n, v in weights.items() if n not in own and not n.startswith(tuple(unused_prefixes))}
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in weights
        and weights[name].shape != own[name].shape
        and not name.startswith(tuple(new_module_prefixes))
    ]
    problems = (
        ("lacks", list_weights(missing)),
        ("has names that are not the model's:", list_weights(extra)),
        ("has other shapes:", list_first(shapes)),
    )
    if missing or extra or shapes:
        listed = "; ".join(f"{problem} {weights_listed}" for problem, weights_listed in problems if weights_listed)
        raise ExportError(f"{source} {listed}")
    return {
        name: value
        for name, value in weights.items()
        if name in own and not name.startswith(tuple(new_module_prefixes))
    }
