"""What a task predicts of an image: rows of a table, files beside it, and what its drawing shows. B images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from foveal.inference.exported_model import ExportedModel
from foveal.inference.image_transform import ImageFrame

Row = Mapping[str, str | int | float]  # by column
Columns = Mapping[str, type]  # str, int or float, by column


@dataclass(frozen=True)
class Prediction:
    """The prediction of one image.

    rows: of a table, without the image's name, the most important first; none if nothing was detected, for example.
    json_rows: the same as JSON objects, where these have another form; None: as ``rows``.
    files: contents of PNG files, by kind (``PredictingTask.prediction_files``).
    drawn: what ``draw_prediction`` shows, in pixels of the input.
    """

    rows: tuple[Row, ...]
    json_rows: tuple[Mapping[str, Any], ...] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    drawn: Any = None


class PredictingTask(Protocol):
    """The part of a task (``finetune/task.py``) that predictions use.

    prediction_columns: of the rows; empty for a task that predicts nothing. prediction_files: kinds of files.
    """

    name: str
    prediction_columns: Columns
    prediction_files: tuple[str, ...]

    def predict(
        self, model: ExportedModel, images: Tensor, frames: Sequence[ImageFrame], top: int | None
    ) -> list[Prediction]:
        """Return the predictions of normalised images [B, C, H, W], which are on the model's device.

        ``frames``: the place of each input in its image. ``top``: the most rows of an image; None: as the task sees fit.
        """
        ...

    def draw_prediction(self, model: ExportedModel, pixels: Tensor, prediction: Prediction) -> Any:
        """Return a Pillow image of an input, uint8 [C, H, W], with its prediction."""
        ...


def round_float32(value: float) -> float:
    """Return a value in the six digits that float32 surely has, so that tables show no others."""
    return float(f"{value:.6g}")
