"""Every invalid input to a data set raises a one-line error with problem, location and remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import eval_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.sampling.subset import select_subset
from foveal.data.tools.cli import app
from foveal.errors import ConfigError, DataError, FovealError


@pytest.fixture
def folder(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits data set that tests damage."""
    shutil.copytree(digits, tmp_path / "copy")
    return tmp_path / "copy"


def open_with(folder: Path | str, **settings: Any) -> Dataset:
    tree = {"path": str(folder), "image_size": 8, "channels": 1, **settings}
    return Dataset.open(DataConfig.from_dict(tree, "the test"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "manifest.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def check_one_line(caught: pytest.ExceptionInfo[FovealError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path: no such folder: .*/nowhere$"):
        open_with(tmp_path / "nowhere")


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no manifest.json and no shards .*; run `foveal data pack` or correct data.path"
    ):
        open_with(tmp_path)


def test_no_index(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=rf"these shards have no index; run `foveal data index {folder}`$"):
        open_with(folder)
    with pytest.raises(DataError, match=rf"no index; run `foveal data index {folder} --index {tmp_path}/elsewhere`$"):
        open_with(folder, index=str(tmp_path / "elsewhere"))


def test_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("FOVEAL_NOWHERE", raising=False)
    with pytest.raises(
        ConfigError, match=r"data.path: '\$\{FOVEAL_NOWHERE\}/x' needs .* FOVEAL_NOWHERE, which is not set"
    ):
        open_with("${FOVEAL_NOWHERE}/x")
    with pytest.raises(ConfigError, match=r"data.index: .* FOVEAL_NOWHERE"):
        open_with(folder, index="$FOVEAL_NOWHERE")
    monkeypatch.setenv("FOVEAL_NOWHERE", str(folder.parent))
    assert open_with("${FOVEAL_NOWHERE}/copy").num_samples("val") == 360


def test_a_url_without_a_manifest(folder: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/nothing"
    with pytest.raises(
        DataError,
        match=rf"^{url}/manifest.json is not there or may not be read .*: run `foveal data index {url} --index FOLD",
    ):
        open_with(url, stall_timeout_seconds=1.0)
    with pytest.raises(DataError, match=rf"^{url}: no manifest.json in {tmp_path}; run `foveal data index {url} --ind"):
        open_with(url, index=str(tmp_path))


def test_a_url_of_an_unknown_kind(folder: Path) -> None:
    with pytest.raises(DataError, match=r"nonsense://x cannot be opened \(Protocol not known: nonsense"):
        open_with("nonsense://x", index=str(folder))


def test_no_such_split(folder: Path) -> None:
    with pytest.raises(DataError, match=r"split 'trian' does not exist; splits with samples: 'train', 'val'$"):
        open_with(folder, train="trian")


def test_a_split_for_evaluation_is_asked_for_when_used(folder: Path) -> None:
    dataset = open_with(folder, val="test")
    cfg = DataConfig.from_dict({"path": str(folder), "image_size": 8, "channels": 1}, "the test")
    with pytest.raises(DataError, match=r"split 'test' does not exist"):
        eval_batches(dataset, cfg, split="test", subset="all", training_seed=0, rank=0, world_size=1, microbatch_size=8)


def test_an_empty_split(folder: Path) -> None:
    edit(folder, lambda tree: tree["splits"].update(train={"samples": 0, "shards": []}))
    with pytest.raises(DataError, match=r"split 'train' is empty; splits with samples: 'val'$"):
        open_with(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "val-000001.tar").unlink()
    with pytest.raises(DataError, match=r"val-000001.tar is missing, and manifest.json lists it: restore it, or index"):
        open_with(folder)


def test_a_missing_index(folder: Path) -> None:
    (folder / "train-000003.tar.index").unlink()
    with pytest.raises(DataError, match=r"train-000003.tar has no index in .*: run `foveal data index"):
        open_with(folder)


@pytest.mark.parametrize("size", [0, 1024])
def test_a_stale_shard(folder: Path, size: int) -> None:
    shard = folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(
        DataError, match=rf"train-000001.tar has {size} bytes and manifest.json says \d+: restore it, or run"
    ):
        open_with(folder)


def test_an_index_of_other_samples(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar.index", folder / "train-000001.tar.index")
    dataset = open_with(folder)
    with pytest.raises(DataError, match=r"train-000001.tar.index is not the index that manifest.json was written with"):
        dataset.labels("train")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree.update(format=2), r"manifest.json has format 2, this foveal reads format 1$"),
        (lambda tree: tree.pop("format"), r"manifest.json has format None, this foveal reads format 1$"),
        (lambda tree: tree.pop("splits"), r"manifest.json: splits is missing"),
        (lambda tree: tree.update(colour=1), r"manifest.json: colour is not a setting"),
        (
            lambda tree: tree["splits"]["val"].update(samples=3),
            r"split 'val' says 3 samples, its shards have another sum",
        ),
        (
            lambda tree: tree["splits"]["val"]["shards"][0].update(file="../../etc/passwd"),
            r"a shard is a plain file name in the data folder",
        ),
    ],
)
def test_a_manifest_that_is_wrong(folder: Path, change: Callable[[dict[str, Any]], Any], expected: str) -> None:
    edit(folder, change)
    with pytest.raises(DataError, match=expected) as caught:
        open_with(folder)
    check_one_line(caught)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff"])
def test_a_manifest_that_is_damaged(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest.json is damaged \(.*\): run `foveal data index`") as caught:
        open_with(folder)
    check_one_line(caught)


def test_statistics_that_are_not_known_or_do_not_fit(folder: Path) -> None:
    edit(folder, lambda tree: tree.update(mean=None, std=None))
    with pytest.raises(DataError, match=r"manifest.json has no pixel statistics; set data.mean and data.std"):
        _ = open_with(folder).mean
    dataset = open_with(folder, mean=(0.5,), std=(0.25,))
    assert (dataset.mean, dataset.std) == ((0.5,), (0.25,))
    edit(folder, lambda tree: tree.update(mean=[0.1, 0.2, 0.3], std=[0.1, 0.2, 0.3]))
    with pytest.raises(DataError, match=r"the std in manifest.json has 3 values for data.channels=1; set data.mean"):
        _ = open_with(folder).std
    edit(folder, lambda tree: tree.update(std=[0.1, 0.0, 0.3]))
    with pytest.raises(DataError, match=r"the std in manifest.json is \[0.1, 0.0, 0.3\], not above 0; set data.mean"):
        _ = open_with(folder, channels=3).std
    assert open_with(folder, channels=3).mean == (0.1, 0.2, 0.3)
    edit(folder, lambda tree: tree.update(mean=[123.675], std=[58.395]))
    for name in ("mean", "std"):
        with pytest.raises(
            DataError, match=rf"the {name} in manifest.json is \[.*\], not of pixels in \[0, 1\]; set data"
        ):
            _ = getattr(open_with(folder), name)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mean": (0.5,), "std": (0.0,)}, r"std=\[0.0\] must be above 0"),
        ({"mean": (0.5,), "std": (64.0,)}, r"std=\[64.0\] must be above 0 and at most 1: .* pixels divided by 255"),
        ({"mean": (128.0,), "std": (0.5,)}, r"mean=\[128.0\] must be within \[0, 1\]: .* pixels divided by 255"),
        ({"mean": (-0.1,), "std": (0.5,)}, r"mean=\[-0.1\] must be within \[0, 1\]"),
        ({"channels": 3, "mean": (0.5,), "std": (0.5,)}, "mean has 1 values for channels=3"),
        ({"channels": 2}, r"channels: input should be 1 or 3 \(given: 2\)"),
        (
            {"image_size": 0},
            r"image_size: a number of pixels or \[height, width\] is expected, each at least 1 \(given: 0\)",
        ),
        ({"image_size": [8, 0]}, r"image_size: a number of pixels .* \(given: \[8, 0\]\)"),
        ({"image_size": [8, 8, 3]}, r"image_size: a number of pixels .* \(given: \[8, 8, 3\]\)"),
        ({"image_size": "8"}, r"image_size: a number of pixels .* \(given: '8'\)"),
        ({"lanes": 0}, "lanes: "),
        ({"eval_crop_ratio": 1.5}, "crop_ratio: "),
        ({"augment": {"scale": (0.5, 1.5)}}, r"augment.scale=\[0.5, 1.5\] must be \[lowest, highest\] within \(0, 1\]"),
        ({"augment": {"ratio": (2.0, 1.0)}}, r"augment.ratio=\[2.0, 1.0\] must be \[lowest, highest\]"),
        ({"windows": 4}, "windows is not a setting. Did you mean 'window'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], expected: str) -> None:
    tree = {"path": "x", "image_size": 8, "channels": 1, **settings}
    with pytest.raises(ConfigError, match=expected.removeprefix("the test: data: ")):
        DataConfig.from_dict(tree, "the test")


def test_an_image_size_has_one_form() -> None:
    sizes = {name: DataConfig.from_dict({"path": "x", "image_size": name}, "the test") for name in (8, (8, 8), (8, 16))}
    assert [cfg.image_size for cfg in sizes.values()] == [8, 8, (8, 16)]
    assert [cfg.image_hw for cfg in sizes.values()] == [(8, 8), (8, 8), (8, 16)]
    assert sizes[8, 16].to_dict()["image_size"] == [8, 16]
    assert sizes[8, 8].science_settings() == sizes[8].science_settings()


def test_what_is_science_and_what_is_not() -> None:
    cfg = DataConfig.from_dict({"path": "x", "image_size": 8}, "the test")
    assert set(cfg.to_flat_dict()) - set(cfg.science_settings()) == {
        "path",
        "index",
        "workers",
        "prefetch_batches",
        "cache.dir",
        "cache.max_gigabytes",
        "stall_timeout_seconds",
        "max_bad_fraction",
        "ledger",
    }


def test_parts_that_cannot_be_chosen(folder: Path) -> None:
    dataset = open_with(folder)

    def select(**settings: Any) -> None:
        part = settings.pop("part", "train")
        tree = {"path": str(folder), "image_size": 8, "channels": 1, "lanes": 2, **settings}
        cfg = DataConfig.from_dict(tree, "the test")
        select_subset(dataset, cfg, split="train", subset=part, seed=0)

    with pytest.raises(ConfigError, match=r"data.holdout_per_class=0 leaves no holdout"):
        select(part="holdout")
    with pytest.raises(
        DataError, match=r"class \d has \d+ samples, too few for data.samples_per_class=500 and data.holdout"
    ):
        select(samples_per_class=500)
    with pytest.raises(DataError, match=r"too few for data.samples_per_class=100 and data.holdout_per_class=100"):
        select(samples_per_class=100, holdout_per_class=100)
    with pytest.raises(DataError, match=r"too few for data.samples_per_class=0 and data.holdout_per_class=150"):
        select(holdout_per_class=150)


def test_samples_without_labels_cannot_be_chosen_by_class(
    tmp_path: Path, write_tar: Callable[..., Path], png: bytes
) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.png", png), ("b.png", png), ("b.cls", b"0")])
    assert CliRunner().invoke(app, ["index", str(tmp_path)]).exit_code == 0
    cfg = DataConfig.from_dict(
        {"path": str(tmp_path), "image_size": 8, "channels": 1, "samples_per_class": 1}, "the test"
    )
    with pytest.raises(
        DataError, match=r"1 samples of split 'train' have no label; data.samples_per_class, data.holdout_per_class"
    ):
        build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=1)


def test_the_command_line_packs_indexes_and_shows(tmp_path: Path) -> None:
    runner = CliRunner()
    target = str(tmp_path / "digits")
    assert "digits: written" in runner.invoke(app, ["pack", "digits", "--out", target]).output
    assert "already there, nothing to do" in runner.invoke(app, ["pack", "digits", "--out", target]).output
    again = runner.invoke(app, ["index", target, "--index", str(tmp_path / "index"), "--name", "numerals"])
    assert again.output.splitlines()[0] == "numerals: members cls, png; 10 classes"
    shown = runner.invoke(app, ["show", target]).output.splitlines()
    assert shown[1].split()[:5] == ["train", "1,437", "samples", "6", "shards"]
    assert shown[-1].split()[:3] == ["9", "144", "36"]
    assert isinstance(runner.invoke(app, ["show", str(tmp_path / "nowhere")]).exception, DataError)
