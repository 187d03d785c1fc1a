"""`foveal inspect`: pictures of an export in a new folder, complete or not at all."""

import resource
from pathlib import Path
from typing import Any

import pytest
from exports import (
    export_backbone,
    export_classifier,
    export_detector,
    export_encoder,
    export_segmenter,
    write_photos,
)
from typer.testing import CliRunner

from foveal.cli import app
from foveal.errors import ConfigError, DataError, ExportError, FovealError
from foveal.inspect.picture import read_title_and_description

VIT = ["activations.png", "attention-distance.png", "attention.png", "features.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 9)
    return folder


def inspect(*arguments: Any, code: int = 0) -> str:
    """Run the command; return what it printed."""
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    if isinstance(result.exception, FovealError):
        assert result.exception.exit_code == 2
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    ("export", "names"),
    [
        (export_encoder, VIT),
        (export_segmenter, VIT),
        (export_detector, VIT),
        (export_backbone, ["activations.png", "features.png"]),
    ],
)
def test_any_export_has_pictures(export: Any, names: list[str], photos: Path, tmp_path: Path) -> None:
    said = inspect(export(tmp_path / "export"), photos, "--out", tmp_path / "pictures", "--limit", 3)
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == names
    assert said.startswith("3 of 9 images, spread evenly\n")
    for name in names:
        title, description = read_title_and_description(tmp_path / "pictures" / name)
        assert title
        assert f"pictures/{name}: {description}\n" in said
    assert "Rows, from the top: 0.png; 4.png; 8.png." in said


def test_a_classifier_says_what_it_sees(photos: Path, tmp_path: Path) -> None:
    one = export_classifier(tmp_path / "one", classes=("<b>only &\nclass",))
    said = inspect(one, photos / "0.png", "--out", tmp_path / "pictures")
    assert "Image: 0.png: <b>only & class (100 %)." in said
    labels = export_classifier(tmp_path / "labels", task="multilabel")
    assert "Image: 0.png." in inspect(labels, photos / "0.png", "--out", tmp_path / "more")


def test_unreadable_images_are_listed(photos: Path, tmp_path: Path) -> None:
    (bad := tmp_path / "bad.png").write_text("no image")
    encoder = export_encoder(tmp_path / "export")
    said = inspect(encoder, bad, photos / "0.png", "--out", tmp_path / "pictures", code=1)
    assert "1 of 2 images cannot be read and were left out" in said
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == VIT
    with pytest.raises(DataError, match=r"no image can be read, of 1 that were tried; .*bad\.png"):
        inspect(encoder, bad, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_mistakes_are_sentences(photos: Path, tmp_path: Path) -> None:
    encoder = export_encoder(tmp_path / "export")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        inspect(encoder, photos, "--out", photos)
    with pytest.raises(ConfigError, match="there is no folder"):
        inspect(encoder, photos, "--out", tmp_path / "no" / "where")
    with pytest.raises(ConfigError, match="--device tpu does not exist"):
        inspect(encoder, photos, "--out", tmp_path / "pictures", "--device", "tpu")
    with pytest.raises(DataError, match="no such file or folder"):
        inspect(encoder, tmp_path / "nothing", "--out", tmp_path / "pictures")
    with pytest.raises(ExportError):
        inspect(photos, photos, "--out", tmp_path / "pictures")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_a_full_disk_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    encoder = export_encoder(tmp_path / "export")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"pictures cannot be written \(.*make room"):
            inspect(encoder, photos, "--out", tmp_path / "pictures")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
