"""foveal: pretraining of vision transformers with a loss curve that is independent of hardware and restarts."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveal.inference.exported_model import ExportedModel

__version__ = "0.2.0"


def load(path: str | Path) -> "ExportedModel":
    """Return the model of an export with its transform and its classes; torch is imported at the first call.

    Raises: ExportError for a folder that is no export, or an altered one.
    """
    from foveal.inference.exported_model import load_exported_model

    return load_exported_model(path)
