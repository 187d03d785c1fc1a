"""A survey of a split reads some labels, the same ones on every rank, and of remote shards only those bytes."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveal.data import label_survey
from foveal.data.config import CacheConfig, DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.masks import MaskReader
from foveal.data.indexing.index import index_folder
from foveal.data.label_survey import SplitSurvey, survey_split
from foveal.data.sampling.sources import SampleSource
from foveal.data.sampling.subset import SplitSubset
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import DataError

SIDE = 4


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


EMPTY, FULL = png(np.zeros((SIDE, SIDE), np.uint8)), png(np.eye(SIDE, dtype=np.uint8))


@pytest.fixture
def survey(tmp_path: Path, write_tar: Callable[..., Path]) -> Callable[..., SplitSurvey]:
    """Return a function that packs masks, 50 to a shard, and surveys them."""
    cache = tmp_path / "cache"

    def run(masks: list[bytes], *, url: bool = False, positions: list[int] | None = None) -> SplitSurvey:
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for start in range(0, len(masks), 50):
            rows = [(f"{start + n:05d}", mask) for n, mask in enumerate(masks[start : start + 50])]
            members = [
                (f"{key}.{name}", data) for key, mask in rows for name, data in (("png", FULL), ("mask.png", mask))
            ]
            write_tar(folder / f"train-{start // 50:06d}.tar", members)
        index_folder(str(folder), classes=("a", "b"), on_warning=lambda _: None)
        path = f"file://{folder}" if url else str(folder)
        cfg = DataConfig(path=path, index=str(folder), image_size=SIDE, cache=CacheConfig(dir=str(cache)))
        dataset = Dataset.open(cfg)
        counts = dataset.samples_per_shard("train")
        subset = SplitSubset(counts, None)
        if positions is not None:
            per_shard = np.bincount(np.array(positions) // 50, minlength=len(counts))
            subset = SplitSubset(per_shard, np.array(positions))
        result = survey_split(MaskReader("mask.png", ("a", "b"), 255), SampleSource(dataset, "train", subset), 60.0)
        assert not list(cache.rglob("*.tar*")), "a survey downloads no shard"
        return result

    return run


@pytest.mark.parametrize("url", [False, True])
def test_a_small_split_is_read_completely(survey: Callable[..., SplitSurvey], url: bool) -> None:
    found = survey([FULL] * 3 if url else [EMPTY] * 60 + [FULL], url=url)
    assert found.findings == ()
    assert found.summary == "3 masks: a 75%, b 25%" if url else found.summary.startswith("61 masks: a 100%, b 0%")


@pytest.mark.parametrize(("url", "number"), [(False, 64), (True, 16)])
def test_a_large_split_is_read_in_part(survey: Callable[..., SplitSurvey], url: bool, number: int) -> None:
    assert survey([FULL] * 130, url=url).summary == f"{number} masks: a 75%, b 25% of 130 samples"


def test_more_is_read_where_nothing_can_be_learned(
    survey: Callable[..., SplitSurvey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_survey, "_MAX_SURVEYED", 100)
    found = survey([EMPTY] * 130)
    assert found.summary == "100 masks: a 100% of 130 samples"
    assert found.first_sentence("fault", "untrainable") is None
    assert found.first_sentence("note") == "every pixel of 100 masks is of class 'a' (id 0)"
    assert survey([EMPTY, FULL] * 65).summary.startswith("64 masks")


def test_a_server_that_sends_complete_files_is_asked_once(
    survey: Callable[..., SplitSurvey], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RemoteFolder.read_up_to

    def read_complete(folder: RemoteFolder, name: str, start: int, stop: int) -> bytes:
        folder.ignores_range |= name.endswith(".tar")
        return read(folder, name, start, stop)

    monkeypatch.setattr(RemoteFolder, "read_up_to", read_complete)
    assert survey([EMPTY] * 130, url=True).summary == "1 masks: a 100% of 130 samples"


def test_only_samples_of_the_subset_are_read(survey: Callable[..., SplitSurvey]) -> None:
    found = survey([EMPTY] * 60 + [FULL] * 3, positions=[3, 60, 61])
    assert found.summary.startswith("3 masks: a 83%, b 17%")


def test_positions_are_distinct_spread_and_the_same_each_time() -> None:
    positions = label_survey._spread_positions(1_000_000, 100)
    assert positions == label_survey._spread_positions(1_000_000, 100)
    assert sorted(position // 10_000 for position in positions) == list(range(100))
    assert np.std(positions[:20]) > 100_000, "the first ones are spread as well"
    assert sorted(label_survey._spread_positions(7, 100)) == list(range(7))


def test_an_invalid_label_ends_the_survey_and_a_bad_image_does_not(
    survey: Callable[..., SplitSurvey], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"sample '0000[12]' has a mask of 4 x 2 pixels and an image of 4 x 4"):
        survey([FULL] + [png(np.zeros((2, 4), np.uint8))] * 2)
    found = survey([FULL, FULL[:40], FULL])
    assert "1 of 3 masks do not decode, the first: " in (found.first_sentence("note") or "")
