"""``foveal export``: an export is written in a format, opened again by its library, compared, and only then published."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foveal.atomic import atomic_folder
from foveal.convert.compare import Difference, Reopened, check_reopened
from foveal.convert.images import read_comparison_images
from foveal.convert.request import DEFAULTS, Options, Request
from foveal.convert.source import Source, find_source
from foveal.errors import ConfigError, ExportError
from foveal.inference.exported_model import load_exported_model

# (what to write, the folder to fill) -> the folder, opened again.
Writer = Callable[[Request, Path], Reopened]
_DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Format:
    """A format: the module with its function ``write``, and the options that it takes."""

    module: str
    options: frozenset[str] = frozenset()


FORMATS = {
    "timm": Format("foveal.convert.to_timm"),
    "hf": Format("foveal.convert.to_hugging_face"),
    "onnx": Format("foveal.convert.to_onnx", frozenset({"patches", "preprocess"})),
    "pt2": Format("foveal.convert.to_pt2", frozenset({"patches", "preprocess"})),
    "safetensors": Format("foveal.convert.to_safetensors", frozenset({"dtype"})),
}


@dataclass(frozen=True)
class Conversion:
    """A published folder, how it was opened, and its differences to foveal's model on ``num_images`` images."""

    folder: Path
    reopened: Reopened
    differences: tuple[Difference, ...]
    num_images: int


def convert(
    path: Path, to: str, out: Path | None = None, images: Path | None = None, options: Options | None = None
) -> Conversion:
    """Convert the export at ``path``, or of the run there, into a new folder (None: beside the export).

    ``images``: a folder of images for the comparison. Raises: ConfigError for options that do not exist; DataError for
    images that do not; ExportError, and nothing is left, if the format cannot hold the model, if the folder exists or
    cannot be written, or if the model gives other outputs when it is opened again.
    """
    options = options or DEFAULTS
    _check_options(to, options)
    source = find_source(path)
    folder = _choose_folder(source, to) if out is None else out
    _check_absent(folder)
    model = load_exported_model(source.export)
    comparison = read_comparison_images(model.transform, images)
    write: Writer = importlib.import_module(FORMATS[to].module).write
    try:
        with atomic_folder(folder) as draft:
            reopened = write(Request(source, model, options, comparison), draft)
            differences = check_reopened(reopened, comparison.pixels, model.classes)
            _check_absent(folder)  # minutes later
    except OSError as error:
        raise ExportError(f"{folder} cannot be written ({error}); make room, or name another place by --out") from None
    return Conversion(folder, reopened, tuple(differences), len(comparison.pixels))


def _check_absent(folder: Path) -> None:
    if folder.exists():
        raise ExportError(f"{folder} exists already; name another folder by --out, or remove it")


def _check_options(to: str, options: Options) -> None:
    if to not in FORMATS:
        raise ConfigError(f"--to {to} does not exist; there are {', '.join(FORMATS)}")
    if options.dtype not in _DTYPES:
        raise ConfigError(f"--dtype {options.dtype} does not exist; there are {', '.join(_DTYPES)}")
    for name, default in (("patches", False), ("preprocess", False), ("dtype", "fp32")):
        if getattr(options, name) != default and name not in FORMATS[to].options:
            takers = [other for other, form in FORMATS.items() if name in form.options]
            raise ConfigError(f"--{name} is for --to {' and '.join(takers)}, not for --to {to}")


def _choose_folder(source: Source, to: str) -> Path:
    export = source.export if source.export.name not in ("", "..") else source.export.resolve()
    return export.with_name(f"{export.name}-{to}")
