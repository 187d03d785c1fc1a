"""What ``foveal export`` converts: an export, or the export of a finished run."""

from dataclasses import dataclass
from pathlib import Path

from foveal.errors import ExportError

_EXPORT_PLACES = ("export", "export/*", "*/*/export")  # of a run, of a run with several, of folds and trials


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
    exports = _list_exports(path)
    if not _is_run(path):
        if nested := sorted(file.parent for file in path.glob("*/card.json")):
            raise ExportError(f"{path} holds several exports; give one of {_join(nested)}")
        raise ExportError(
            f"{path} is neither a run of foveal's (it has no science.json) nor an export (it has no card.json)"
        )
    if not (path / "finished.json").exists():
        raise ExportError(f"{path} is the directory of an unfinished run; start the run again, it goes on to its end")
    if not exports:
        raise ExportError(f"{path} is a finished run without an export; a run of probes, for example, writes none")
    if len(exports) > 1:
        raise ExportError(f"{path} has several exports; give one of {_join(exports)}")
    return Source(exports[0], path)


def _is_run(path: Path) -> bool:
    return (path / "science.json").exists() or (path / "attempts").is_dir()


def _list_exports(run: Path) -> list[Path]:
    return sorted({file.parent for place in _EXPORT_PLACES for file in run.glob(f"{place}/card.json")})


def _join(folders: list[Path]) -> str:
    return ", ".join(map(str, folders[:5])) + (f" and {len(folders) - 5} more" if len(folders) > 5 else "")
