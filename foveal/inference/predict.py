"""Predictions of an exported model on images, as its evaluation made them, in a table, files and drawings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foveal.errors import ConfigError, OutOfMemoryError
from foveal.inference.decoding import DecodedBatch, UnreadableImage, iter_decoded_batches
from foveal.inference.exported_model import ENCODER, ExportedModel, import_task
from foveal.inference.file_names import make_file_names
from foveal.inference.image_inputs import ImageList
from foveal.inference.new_outputs import check_new, new_outputs, writing
from foveal.inference.prediction_table import PredictionTable, TextTable, check_table_format, open_table
from foveal.inference.predictions import Columns, PredictingTask, Prediction

Progress = Callable[[int, int], None]  # finished and all images


@dataclass(frozen=True)
class PredictionOutputs:
    """Where predictions go, in paths that do not exist.

    table: a file; None: text on stdout. overlays: a folder of drawings; None: none are drawn.
    """

    table: Path | None = None
    overlays: Path | None = None

    def check(self) -> None:
        """Raise ConfigError if an output exists, has no folder, or says no format."""
        if self.table is not None:
            check_table_format(self.table)
        for target in (self.table, self.overlays):
            if target is not None:
                check_new(target)

    def file_folder(self, kind: str) -> Path:
        """Return the folder beside the table for files of a kind, such as predictions-masks/."""
        assert self.table is not None
        return self.table.with_name(f"{self.table.stem}-{kind}s")


@dataclass(frozen=True)
class PredictionCounts:
    """What was predicted. rows: of the table; folders: files in each folder that was written."""

    images: int
    rows: int
    folders: Mapping[Path, int]
    unreadable: tuple[UnreadableImage, ...]


def find_predicting_task(model: ExportedModel) -> PredictingTask:
    """Return the task that predicts with a model. Raises: ConfigError if it has none."""
    if model.task == ENCODER:
        raise ConfigError(f"{model.path} is an encoder without a head: `foveal embed` computes its features")
    task: PredictingTask = import_task(model.task)
    if not task.prediction_columns:
        raise ConfigError(f"{model.path} is of task={model.task}, which predicts nothing for a table")
    return task


def predict_images(
    model: ExportedModel,
    images: ImageList,
    outputs: PredictionOutputs,
    *,
    batch_size: int,
    device: torch.device,
    top: int | None = None,
    on_progress: Progress = lambda _finished, _total: None,
) -> PredictionCounts:
    """Predict every image and write the outputs, all of them or, on an error, none.

    Raises: ConfigError, DataError, OutOfMemoryError.
    """
    task = find_predicting_task(model)
    outputs.check()
    model.module.to(device)
    unreadable: list[UnreadableImage] = []
    finished = 0
    with (
        _open_writer(model, task, images, outputs) as writer,
        closing(iter_decoded_batches(images, range(len(images)), model.transform, batch_size)) as batches,
    ):
        for batch in batches:
            if batch.names:
                predictions = _predict_batch(model, task, batch, device, top)
                writer.write(batch, predictions)
            unreadable += batch.unreadable
            finished += batch.num_images
            on_progress(finished, len(images))
    return PredictionCounts(len(images) - len(unreadable), writer.num_rows, writer.num_files, tuple(unreadable))


@torch.no_grad()
def _predict_batch(
    model: ExportedModel, task: PredictingTask, batch: DecodedBatch, device: torch.device, top: int | None
) -> list[Prediction]:
    with explain_out_of_memory(len(batch.names)):
        inputs: Tensor = model.transform.normalise(batch.pixels.to(device))
        return task.predict(model, inputs, batch.frames, top)


class _PredictionWriter:
    """The drafts of all outputs."""

    def __init__(
        self,
        model: ExportedModel,
        task: PredictingTask,
        outputs: PredictionOutputs,
        table: PredictionTable,
        file_names: Sequence[str],
        folders: Mapping[str, tuple[Path, Path]],
    ) -> None:
        """``folders``: target and draft of the folder of each kind of file, and of the drawings ("overlay")."""
        self._model, self._task, self._outputs, self._table = model, task, outputs, table
        self._file_names, self._folders = file_names, folders
        self.num_rows = 0
        self.num_files = {target: 0 for target, _ in folders.values()}

    def write(self, batch: DecodedBatch, predictions: Sequence[Prediction]) -> None:
        """Write the predictions of a batch. Raises: DataError."""
        for name, position, pixels, prediction in zip(
            batch.names, batch.positions, batch.pixels, predictions, strict=True
        ):
            file_name = self._file_names[position] if self._folders else ""
            paths = {
                kind: self._write_file(kind, file_name, content)
                for kind, content in prediction.files.items()
                if kind in self._folders
            }
            json_rows = prediction.rows if prediction.json_rows is None else prediction.json_rows
            with writing(self._outputs.table or Path("stdout")):
                self._table.write(
                    name, [dict(row) | paths for row in prediction.rows], [dict(row) | paths for row in json_rows]
                )
            self.num_rows += len(prediction.rows)
            if "overlay" in self._folders:
                target, draft = self._folders["overlay"]
                drawing = self._task.draw_prediction(self._model, pixels, prediction)
                with writing(target):
                    drawing.save(draft / file_name, "PNG")
                self.num_files[target] += 1

    def _write_file(self, kind: str, file_name: str, content: bytes) -> str:
        """Write a file and return its path from the table's folder."""
        target, draft = self._folders[kind]
        with writing(target):
            (draft / file_name).write_bytes(content)
        self.num_files[target] += 1
        return f"{target.name}/{file_name}"


@contextmanager
def _open_writer(
    model: ExportedModel, task: PredictingTask, images: ImageList, outputs: PredictionOutputs
) -> Iterator[_PredictionWriter]:
    kinds = task.prediction_files if outputs.table is not None else ()
    targets = {kind: outputs.file_folder(kind) for kind in kinds}
    if outputs.overlays is not None:
        targets["overlay"] = outputs.overlays
    columns: Columns = dict(task.prediction_columns) | dict.fromkeys(kinds, str)
    all_targets = [*targets.values(), *([outputs.table] if outputs.table is not None else [])]
    with new_outputs(all_targets) if all_targets else _no_outputs() as drafts:
        folders = {kind: (target, draft) for (kind, target), draft in zip(targets.items(), drafts, strict=False)}
        for target, draft in folders.values():
            with writing(target):
                draft.mkdir()
        if outputs.table is None:
            table: PredictionTable = TextTable(columns, max(len(images[n].name) for n in range(len(images))))
        else:
            with writing(outputs.table):
                table = open_table(drafts[-1], outputs.table.suffix, columns)
        file_names = make_file_names(images) if folders else ()
        with _closed_at_end(table, outputs.table):
            yield _PredictionWriter(model, task, outputs, table, file_names, folders)


@contextmanager
def _no_outputs() -> Iterator[list[Path]]:
    yield []


@contextmanager
def _closed_at_end(table: PredictionTable, target: Path | None) -> Iterator[None]:
    """Close a table. After an error, that of closing it, which a full disk causes once more, is not raised."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            table.close()
        raise
    with writing(target or Path("stdout")):
        table.close()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of an option: cpu, cuda, or auto. Ranks of a node share its GPUs. Raises: ConfigError."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name} does not exist; there are auto, cpu, cuda")
    if name == "cuda" and not num_gpus:
        raise ConfigError("--device cuda needs a GPU that torch can use, and there is none: leave --device out")
    return torch.device("cuda", local_rank % num_gpus) if num_gpus and name != "cpu" else torch.device("cpu")


@contextmanager
def explain_out_of_memory(num_images: int) -> Iterator[None]:
    """Turn torch's error into an OutOfMemoryError with the option that helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        detail = str(error).partition(". ")[0]
        raise OutOfMemoryError(f"{num_images} images at a time are too many ({detail}): lower --batch-size") from None
