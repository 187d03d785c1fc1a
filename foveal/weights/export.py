"""Exports: ``model.safetensors`` under timm's names and ``card.json``, the interface between stages.

The card holds what the weights do not: architecture, grid and position type, mean and standard deviation of pixels,
pooling, class names and provenance. A head that is not timm's is stored in ``head.safetensors``, so that every export
is an encoder for the next stage. No pickle is read from an export.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveal.atomic import atomic_folder, sha256
from foveal.errors import ExportError
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout
from foveal.weights.weight_lists import list_first, list_weights

EXPORT_FORMAT = 1
_TUPLE_FIELDS = ("mean", "std", "classes", "resized_from")  # lists in JSON
_MODEL, _HEAD = "model.safetensors", "head.safetensors"


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Card:
    """The metadata of an export.

    ``encoder`` rebuilds the module (sizes, grid, position type, pooling, channels); ``mean`` and ``std`` are of pixels
    in [0, 1]; ``classes`` are the class names in the order of the head's outputs, empty for an encoder;
    ``resized_from`` is the image size of the initial export, if this stage used a different one; ``head`` rebuilds the
    head in ``head.safetensors`` (its ``kind`` first), None without that file.
    """

    stage: str
    encoder: dict[str, Any]
    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    classes: tuple[str, ...] = ()
    resized_from: int | tuple[int, ...] | None = None
    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    science: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    format: int = EXPORT_FORMAT
    head: dict[str, Any] | None = None
    head_sha256: str = ""


def write_export(
    folder: Path, weights: dict[str, Tensor], card: Card, head_weights: dict[str, Tensor] | None = None
) -> None:
    """Write an export atomically; ``head_weights`` belong to the head that ``card.head`` describes."""
    assert (head_weights is None) == (card.head is None)
    with atomic_folder(folder) as draft:
        fields = asdict(card) | {"sha256": _write_weights(draft / _MODEL, weights)}
        if head_weights is None:
            del fields["head"], fields["head_sha256"]
        else:
            fields["head_sha256"] = _write_weights(draft / _HEAD, head_weights)
        (draft / "card.json").write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n")


def filter_and_strip_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights under a name prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def read_card(folder: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> Card:
    """Read the card of an export; ``timeout_seconds``: limit for storage without progress.

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

    ``timeout_seconds`` as in ``read_card``. Raises: ExportError for an incomplete or altered export;
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


def _write_weights(file: Path, weights: dict[str, Tensor]) -> str:
    """Write weights and return the file's sha256; tied weights are written under each of their names."""
    unshared = {}
    storages = set()
    for name, value in weights.items():
        contiguous = value.contiguous()
        storage = contiguous.untyped_storage().data_ptr()
        unshared[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    file.touch()
    mode = file.stat().st_mode  # as the umask says
    save_file(unshared, file)
    file.chmod(mode)  # safetensors replaces the file by one that only its owner can read
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
