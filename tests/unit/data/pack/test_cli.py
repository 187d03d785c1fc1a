"""The command line of `foveal data pack`."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from foveal.data.format.manifest import read_manifest
from foveal.data.pack.cli import app
from foveal.data.pack.options import PackOptions
from foveal.errors import ConfigError, DataError


def invoke(*arguments: object) -> str:
    """Run the command and return its output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """One class folder with six images, the third of which is truncated, and a table of them."""
    folder = tmp_path / "in" / "images"
    folder.mkdir(parents=True)
    rows = ["file,kind"]
    for number in range(6):
        file = folder / f"{number}.jpg"
        Image.effect_noise((40, 30), 50).save(file)
        if number == 2:
            file.write_bytes(file.read_bytes()[:-50])
        rows.append(f"{file.name},{'odd' if number % 2 else 'even'}")
    (folder / "table.csv").write_text("\n".join(rows))
    return folder


def test_every_option_of_a_recipe_can_be_invoke(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    options = "--shard-mb 1 --samples-per-shard 2 --workers 2 --resize 20 --format webp --quality 70 --bit-depth 12 --skip-bad"
    options += " --val-fraction 0 --name mine --image-column file --label-column kind"
    output = invoke("table", images / "table.csv", "--out", out, *options.split())
    assert f"{out}: written" in output
    assert f"1 images do not decode and were left out; {out / 'skipped.txt'} lists them" in output.replace("\n", "")
    manifest = read_manifest(out)
    assert (manifest.name, manifest.classes, manifest.fields) == ("mine", ("even", "odd"), ("cls", "webp"))
    assert sorted(shard.samples for shard in manifest.splits["train"].shards) == [1, 2, 2]
    assert set(PackOptions.model_fields) == {word[2:].replace("-", "_") for word in options.split() if "--" in word} - {
        "image_column",
        "label_column",
    }
    assert "already there, nothing to do" in invoke("table", images / "table.csv", "--out", out, *options.split())


def test_a_command_without_options_has_those_of_the_recipe(tmp_path: Path, images: Path) -> None:
    Image.new("L", (40, 30)).save(images / "2.jpg")
    for options, counts in ((), {"train": 5, "val": 1}), (("--val-fraction", 0), {"train": 6}):
        out = tmp_path / "outs" / str(len(options))
        summary = invoke("folder", images.parent, "--out", out, *options).splitlines()[0]
        splits = ", ".join(f"{name} {count}" for name, count in counts.items())
        assert summary == f"{out}: written, 6 samples of 'in': {splits}; 1 class: images"
        assert {name: split.samples for name, split in read_manifest(out).splits.items()} == counts


def test_what_was_understood_is_printed(tmp_path: Path, images: Path) -> None:
    Image.new("L", (40, 30)).save(images / "2.jpg")
    rows = [f"{number}.jpg;{'1|3' if number else '3'};[{number % 2}, 2]" for number in range(6)]
    (images / "table.csv").write_text("\n".join(["image;joined;listed", *rows]))
    for options in (("joined", "--label-separator", "|"), ("listed", "--label-lists", "classes")):
        command = ["table", images / "table.csv", "--out", tmp_path / options[0], "--label-column", *options]
        first, again = invoke(*command).splitlines(), invoke(*command).splitlines()
        assert first[1:] == again[1:]
        assert "  a semicolon separates the columns" in first
        assert (
            f"  column '{options[0]}': labels are lists, stored in .json members, which task=multilabel reads" in first
        )


@pytest.mark.parametrize("command", ["folder", "table", "hf"])
def test_a_wrong_option_is_a_sentence(command: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quality: input should be less than or equal to 100 \(given: 101\)"):
        invoke(command, tmp_path, "--out", tmp_path / "out", "--quality", 101)
    assert "one per core" in invoke(command, "--help")


def test_what_is_a_split_can_be_stated(tmp_path: Path, images: Path) -> None:
    Image.new("L", (40, 30)).save(images / "2.jpg")
    source = images.rename(images.with_name("test")).parent
    with pytest.raises(DataError, match=r"'test' names a split, and there is no 'train'; state --splits none"):
        invoke("folder", source, "--out", tmp_path / "out")
    assert "train 5, val 1; 1 class: test" in invoke("folder", source, "--out", tmp_path / "out", "--splits", "none")
