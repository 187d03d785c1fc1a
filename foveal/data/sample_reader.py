"""From bytes to rows of a microbatch: read, decode, crop and augment samples. Plain data in and out."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from foveal.data.batch import BadSample
from foveal.data.batch_plan import BatchPlan, PlannedRows
from foveal.data.image.decode import UndecodableError, decode_crop
from foveal.data.image.targets import AppliedCrop
from foveal.data.image.transforms import CropBox
from foveal.data.row_arrays import ReadResult
from foveal.data.sampling.sources import SampleLocation, find_image_member
from foveal.errors import DataError, StorageUnreachableError


class ReadMonitor:
    """What a reader reports while it works; this one keeps nothing."""

    def start_sample(self, description: str) -> None:
        """Take notice of the sample, or of the shard whose index is opened for it, that is read from now on."""

    def finish_sample(self) -> None:
        """Take notice that a sample is in its row."""

    def is_cancelled(self) -> bool:
        """Return whether nobody waits for the rows any more."""
        return False


class SampleReader:
    """Reads the samples of a plan's microbatches into arrays."""

    def __init__(self, plan: BatchPlan, monitor: ReadMonitor) -> None:
        self._plan = plan
        self._monitor = monitor

    def read_rows(self, number: int, rows: range, arrays: Mapping[str, np.ndarray]) -> ReadResult:
        """Write some rows of a microbatch into its arrays (``RowLayout``): padding, and samples.

        The bytes of a row depend on nothing but the plan. Returns early if the monitor is cancelled.
        Raises: DataError with shard and sample.
        """
        planned = self._plan.plan_rows(number, rows)
        task = _RowsTask(self._plan, self._monitor, planned, rows, arrays)
        for position, row in enumerate(rows):
            if self._monitor.is_cancelled():
                break
            if position < len(planned.sample_keys):
                task.fill_row(position)
                self._monitor.finish_sample()
            else:
                task.leave_empty(row)
        return ReadResult(tuple(task.bad_samples), tuple(task.labels.items()))


class _RowsTask:
    """The rows of one call, their bad samples, and by row the labels of varying shape."""

    def __init__(
        self,
        plan: BatchPlan,
        monitor: ReadMonitor,
        planned: PlannedRows,
        rows: range,
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        self._plan, self._monitor, self._planned, self._rows, self._arrays = plan, monitor, planned, rows, arrays
        self.bad_samples: list[BadSample] = []
        self.labels: dict[int, np.ndarray] = {}

    def fill_row(self, position: int) -> None:
        """Load the sample of a row, or what replaces it."""
        row, sample_key = self._rows[position], int(self._planned.sample_keys[position])
        try:
            self._load_sample(position, sample_key)
        except UndecodableError as error:
            replacement_keys = self._planned.replacement_keys
            if replacement_keys is None:
                replacement_key = self.leave_empty(row)
            else:
                replacement_key = self._load_replacement(position, replacement_keys(position), error)
            location = self._plan.locate_sample(sample_key)
            bad_sample = BadSample(
                row=row,
                sample_key=sample_key,
                replacement_key=replacement_key,
                split=location.split,
                shard=location.dataset.shard_display_path(location.split, location.shard_number),
                webdataset_key=location.shard_index.key(location.index_row),
                byte_offset=self._find_image(location)[0],
                reason=str(error),
            )
            self.bad_samples.append(bad_sample)

    def leave_empty(self, row: int) -> int:
        """Mark a row as invalid and return -1, the key of no replacement."""
        arrays, reader = self._arrays, self._plan.label_reader
        arrays["images"][row] = 0
        for name in ("ids", "sample_keys", "labels"):
            arrays[name][row] = -1
        arrays["valid"][row] = False
        self.labels.pop(row, None)
        if "targets" in arrays and reader is not None:
            arrays["targets"][row] = reader.empty_label(self._plan.output_hw)
        return -1

    def _load_sample(self, position: int, sample_key: int) -> None:
        """Load a sample into a row. Raises: UndecodableError, DataError."""
        plan, row = self._plan, self._rows[position]
        cfg, output_hw, reader = plan.cfg, plan.output_hw, plan.label_reader
        location = plan.locate_sample(sample_key)
        shard_path = location.dataset.shard_display_path(location.split, location.shard_number)
        # Opening the index, which has the key, can hang. Until it is open the description is the shard only.
        self._monitor.start_sample(shard_path)
        index = location.shard_index
        self._monitor.start_sample(f"{shard_path}: sample '{index.key(location.index_row)}'")
        applied_crops: list[AppliedCrop] = []

        def choose_crop(width: int, height: int) -> tuple[CropBox, bool]:
            box, flipped = self._planned.crop_of(position, sample_key)(width, height)
            applied_crops.append(AppliedCrop(width, height, box, flipped, output_hw))
            return box, flipped

        def decode(data: bytes) -> np.ndarray:
            return decode_crop(
                data,
                cfg.channels,
                choose_crop,
                output_hw,
                cfg.augment.interpolation,
                cfg.jpeg_scaling,
                cfg.decode_version,
                location.dataset.manifest.bit_depth,
            )

        arrays = self._arrays
        image = _read_and_decode(location, self._find_image(location), decode)
        arrays["images"][row] = plan.augment(sample_key, image)
        if reader is not None:
            member = index.find_member_offset_size(location.index_row, reader.field)
            if member is None:
                raise DataError(
                    f"{location.description} has no member .{reader.field}, which is its label: write its shard again"
                )
            label = _read_and_decode(
                location, member, lambda data: reader.read_label(data, applied_crops[0], location.description)
            )
            if "targets" in arrays:
                arrays["targets"][row] = label
            else:
                self.labels[row] = label
        arrays["labels"][row] = index.labels[location.index_row]
        arrays["sample_keys"][row] = sample_key
        arrays["ids"][row] = sample_key % plan.num_ids
        arrays["valid"][row] = True

    def _find_image(self, location: SampleLocation) -> tuple[int, int]:
        """Return offset and size, in bytes, of a sample's image. Raises: DataError as ``find_image_member``."""
        reader = self._plan.label_reader
        return find_image_member(location, None if reader is None else reader.field, self._plan.cfg.decode_version)

    def _load_replacement(self, position: int, replacement_keys: Iterator[int], reason: UndecodableError) -> int:
        """Load the first of these samples that decodes and return its key.

        reason: why the row's own sample does not. Raises: DataError if none decodes.
        """
        num_undecodable = 0
        for replacement_key in replacement_keys:
            try:
                self._load_sample(position, replacement_key)
            except UndecodableError:
                num_undecodable += 1
                continue
            return replacement_key
        location = self._plan.locate_sample(int(self._planned.sample_keys[position]))
        raise DataError(
            f"{location.description} does not decode, nor does any of the {num_undecodable} samples that could replace "
            f"it ({reason}): run `foveal data verify {location.dataset.folder} --full`"
        )


def _read_and_decode(
    location: SampleLocation, member: tuple[int, int], decode: Callable[[bytes], np.ndarray]
) -> np.ndarray:
    """Read a member (offset, size) of a sample and return what ``decode`` makes of its bytes.

    Raises: UndecodableError if the bytes do not decode and are the same for every run; DataError if the shard does not
    have the manifest's sha256, StorageUnreachableError if two reads differ. Replacing the sample in these two cases
    would make this run's curve differ from that of an identical run.
    """
    data = location.dataset.read_bytes(location.shard_index.shard, *member)
    try:
        return decode(data)
    except UndecodableError:
        location.dataset.verify_checksum_once(location.split, location.shard_number)
        if location.dataset.read_bytes(location.shard_index.shard, *member) != data:
            raise StorageUnreachableError(
                f"{location.description} reads differently each time: check its storage, and start again"
            ) from None
        raise
