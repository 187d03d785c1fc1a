"""An export: ``model.safetensors`` under timm's names and ``card.json``, all that a stage hands to the next.

The card holds what the weights cannot say: the architecture, grid and position type, the pixels' mean and standard
deviation, the pooling, the class names, and where it all came from. What stands on the encoder and is no head of timm's
lies beside it, in ``head.safetensors``: the next stage takes the encoder and need not know. No pickle is read from an
export.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveal.atomic import atomic_folder, sha256
from foveal.errors import ExportError
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout

EXPORT_FORMAT = 1
_TUPLE_FIELDS = ("mean", "std", "classes", "resized_from")  # tuples, which JSON does not have
_MODEL, _HEAD = "model.safetensors", "head.safetensors"


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Card:
    """What travels with the weights.

    ``encoder`` is what builds the module again (sizes, grid, position type, pooling, channels); ``mean`` and ``std`` are
    of pixels in [0, 1]; ``classes`` are the names in the order of the head's outputs, none for an encoder;
    ``resized_from`` is the image size of the export that the stage began with, where it took another one; ``head`` is
    what builds the head in ``head.safetensors`` again (its ``kind`` first), none where there is no such file.
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
    """Write an export, whole or not at all; ``head`` are the weights of what ``card.head`` describes."""
    assert (head_weights is None) == (card.head is None)
    with atomic_folder(folder) as draft:
        tree = asdict(card) | {"sha256": _write_weights(draft / _MODEL, weights)}
        if head_weights is None:
            del tree["head"], tree["head_sha256"]
        else:
            tree["head_sha256"] = _write_weights(draft / _HEAD, head_weights)
        (draft / "card.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def filter_and_strip_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def read_card(folder: Path, timeout_seconds: float = DEFAULT_STALL_TIMEOUT) -> Card:
    """The card of an export; ``patience``: seconds that its storage may stand still.

    Raises: ExportError where there is no export, or one of another format; Unreachable where storage does not answer.
    """
    file = folder / "card.json"
    try:
        tree: dict[str, Any] = read_with_timeout(file, timeout_seconds, lambda: json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        inside = sorted(file.parent.name for file in folder.glob("*/card.json"))
        hint = f"one of the exports in it ({', '.join(inside)})" if inside else "the export folder of a finished run"
        raise ExportError(f"{folder} is no export: it has no card.json; give {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None
    if not isinstance(tree, dict) or tree.get("format") != EXPORT_FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise ExportError(f"{folder} has export format {found}; this foveal reads format {EXPORT_FORMAT}")
    try:
        lists: dict[str, Any] = {
            name: tuple(value) for name, value in tree.items() if name in _TUPLE_FIELDS and isinstance(value, list)
        }
        return Card(**tree | lists)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, said = ".".join(str(part) for part in first["loc"]), first["msg"]
        raise ExportError(f"{file} is not as foveal wrote it ({place!r}: {said}); export it again") from None


def read_export(folder: Path, timeout_seconds: float = DEFAULT_STALL_TIMEOUT) -> tuple[dict[str, Tensor], Card]:
    """The weights (fp32, CPU) and card of an export, its digest checked; ``patience`` as in ``read_card``.

    Raises: ExportError where it is not whole; Unreachable where storage does not answer.
    """
    card = read_card(folder, timeout_seconds)
    return _read_weights(folder / _MODEL, card.sha256, timeout_seconds), card


def read_head(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights (fp32, CPU) of the head of an export, its digest checked, and what builds it again.

    Raises: ExportError where it is not whole, or has no head of this kind.
    """
    card = read_card(folder)
    found = None if card.head is None else card.head.get("kind")
    if card.head is None or found != kind:
        raise ExportError(f"{folder} has {f'a head for {found}' if found else 'no head'}, and one for {kind} is wanted")
    return _read_weights(folder / _HEAD, card.head_sha256, DEFAULT_STALL_TIMEOUT), card.head


def _write_weights(file: Path, weights: dict[str, Tensor]) -> str:
    """Write weights; the file's digest. Those that modules share (tied ones) are written under each of their names."""
    apart, storages = {}, set()
    for name, value in weights.items():
        whole = value.contiguous()
        storage = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if storage in storages else whole
        storages.add(storage)
    save_file(apart, file)
    return sha256(file)


def _read_weights(file: Path, digest: str, patience: float) -> dict[str, Tensor]:
    def read() -> dict[str, Tensor]:
        if sha256(file) != digest:
            raise ExportError(f"{file} is not the file that its card describes (sha256 differs); export it again")
        return load_file(file)

    try:
        return read_with_timeout(file, patience, read)
    except FileNotFoundError:
        raise ExportError(f"{file.parent} is no whole export: {file.name} is missing") from None
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None


def load_weights_strict(
    module: nn.Module,
    weights: dict[str, Tensor],
    source: Path,
    *,
    new_prefixes: Sequence[str] = (),
    unused_prefixes: Sequence[str] = (),
) -> None:
    """Load weights into a module, with no difference in names or shapes but the stated ones (see ``fitting``)."""
    module.load_state_dict(
        module.state_dict()
        | select_matching_weights(module, weights, source, new_prefixes=new_prefixes, unused_prefixes=unused_prefixes)
    )


def select_matching_weights(
    module: nn.Module,
    weights: dict[str, Tensor],
    source: Path,
    *,
    new_prefixes: Sequence[str] = (),
    unused_prefixes: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Those of the weights that a module takes.

    ``new`` and ``unused`` are prefixes of names that may be fresh in the module, or left over in the weights.
    Raises: ExportError that lists what does not fit.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights and not name.startswith(tuple(new_prefixes))]
    extra = [name for name in weights if name not in own and not name.startswith(tuple(unused_prefixes))]
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape and not name.startswith(tuple(new_prefixes))
    ]
    for what, names in (
        ("lacks", missing),
        ("has names that are not the model's:", extra),
        ("has other shapes:", shapes),
    ):
        if names:
            raise ExportError(
                f"{source} {what} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            )
    return {name: value for name, value in weights.items() if name in own and not name.startswith(tuple(new_prefixes))}
