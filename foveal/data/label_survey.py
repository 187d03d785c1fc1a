"""A look at some labels of a split before a run: what they hold, and whether they can be meant so.

Every rank looks at the same samples and comes to the same result. Of remote shards only the samples are read, and one
of a server that sends complete files.
"""

from dataclasses import dataclass

import numpy as np

from foveal.data.image.decode import UndecodableError, read_image_size
from foveal.data.image.targets import Finding, LabelReader, LabelSurvey
from foveal.data.sampling.sources import SampleLocation, SampleSource
from foveal.errors import DataError
from foveal.seeding import derive_key, draw_permutation, draw_uniform_numpy
from foveal.timeouts import read_with_timeout

NUM_SURVEYED = 64  # samples; masks of some megapixels take a second
_NUM_SURVEYED_REMOTE = 16
_MAX_SURVEYED = 1024  # if the first samples have nothing to learn, which rare objects may explain
_MAX_SURVEYED_REMOTE = 64


@dataclass(frozen=True)
class SplitSurvey:
    """Survey of a split: what it holds as a line, and what its labels show."""

    summary: str
    findings: tuple[Finding, ...]

    def first_sentence(self, *severities: str) -> str | None:
        """Return the first finding of these severities as a sentence; None if there is none."""
        return next((finding.sentence for finding in self.findings if finding.severity in severities), None)


def survey_split(reader: LabelReader, source: SampleSource, stall_timeout: float) -> SplitSurvey:
    """Read labels of at most ``NUM_SURVEYED`` samples spread over a source, and more if they have nothing to learn.

    stall_timeout: seconds that reading may make no progress. Raises: DataError if a label is invalid or missing.
    """
    return read_with_timeout(source.dataset.folder, stall_timeout, lambda: _survey_split(reader, source))


def _survey_split(reader: LabelReader, source: SampleSource) -> SplitSurvey:
    survey, num_samples = reader.make_survey(), len(source.subset)
    is_remote = source.dataset.is_remote
    first = _NUM_SURVEYED_REMOTE if is_remote else NUM_SURVEYED
    num_read = 0
    for position in _spread_positions(num_samples, _MAX_SURVEYED_REMOTE if is_remote else _MAX_SURVEYED):
        is_enough = num_read >= first and not survey.needs_more()
        if is_enough or source.dataset.shard_folder.ignores_range:
            break
        sample_id = int(source.subset.to_split_positions(np.array([position]))[0])
        num_read += 1
        _add_sample(survey, source.locate_sample(source.first_id + sample_id))
    of_all = "" if num_read == num_samples else f" of {num_samples:,} samples"
    findings = survey.findings(is_complete=num_read == num_samples)
    return SplitSurvey(f"{survey.summary()}{of_all}", tuple(findings))


def _spread_positions(num_samples: int, limit: int) -> list[int]:
    """Return distinct positions in a random order: all, or one of each of ``limit`` equal parts."""
    if num_samples <= limit:
        positions = np.arange(num_samples)
    else:
        parts = np.arange(limit)
        offsets = draw_uniform_numpy(derive_key(0, "label survey"), parts, 1)[:, 0].astype(np.float64)
        positions = ((parts + offsets) * num_samples / limit).astype(np.int64)
    return positions[draw_permutation(derive_key(0, "label survey order"), len(positions))].tolist()


def _add_sample(survey: LabelSurvey, location: SampleLocation) -> None:
    """Add the label of a sample to a survey. An image that does not decode is left to the loader."""
    index = location.shard_index
    member = index.find_member_offset_size(location.index_row, survey.field)
    if member is None:
        raise DataError(
            f"{location.description} has no member .{survey.field}, which is its label: write its shard again"
        )
    try:
        image_member = index.find_image_offset_size(location.index_row, survey.field)
        image = location.dataset.read_range(index.shard, *image_member)
        size = read_image_size(image)
        survey.add(location.dataset.read_range(index.shard, *member), size, location.description)
    except UndecodableError:
        return  # counted, if it is the label
