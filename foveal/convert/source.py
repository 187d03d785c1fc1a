"""What ``foveal export`` converts: an export, or the export of a finished run."""

from dataclasses import dataclass
from pathlib import Path

from foveal.errors import ExportError
from foveal.inference.exported_model import format_folders, list_exports


@dataclass(frozen=True)
class Source:
    """An export, and the run directory if that was given; a run also has checkpoints."""

    export: Path
    run: Path | None = None


def find_source(path: Path) -> Source:
    """Return the export at ``path``, or that of the finished run at ``path``.

    Raises: ExportError for a path that is neither, a run that is not finished, and a run with no or several exports.
    """
    if (path / "card.json").exists():
        return Source(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise ExportError(f"{path} {problem}; give the directory of a finished run, or an export in it")
    exports = list_exports(path)
    if not _is_run(path):
        if nested := sorted(file.parent for file in path.glob("*/card.json")):
            raise ExportError(f"{path} holds several exports; give one of {format_folders(nested)}")
        raise ExportError(
            f"{path} is neither a run of foveal's (it has no science.json) nor an export (it has no card.json)"
        )
    if not (path / "finished.json").exists():
        raise ExportError(f"{path} is the directory of an unfinished run; start the run again, it goes on to its end")
    if not exports:
        raise ExportError(f"{path} is a finished run without an export; a run of probes, for example, writes none")
    if len(exports) > 1:
        raise ExportError(f"{path} has several exports; give one of {format_folders(exports)}")
    return Source(exports[0], path)


def _is_run(path: Path) -> bool:
    return (path / "science.json").exists() or (path / "attempts").is_dir()
