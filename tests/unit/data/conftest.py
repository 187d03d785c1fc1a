"""Shards for the data tests: the packed digits, and hand-written tars with a single fault."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.pack import pack_digits

ReadTar = Callable[[Path], list[dict[str, Any]]]
WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "digits"
    assert pack_digits(folder)
    return folder


@pytest.fixture
def configure(digits: Path) -> Callable[..., DataConfig]:
    """Return a factory of configs of the digits with other settings."""

    def make(**settings: Any) -> DataConfig:
        tree = {"path": str(digits), "image_size": 8, "channels": 1, "lanes": 8, **settings}
        return DataConfig.from_dict(tree, "the test")

    return make


@pytest.fixture
def dataset(configure: Callable[..., DataConfig]) -> Dataset:
    return Dataset.open(configure())


@pytest.fixture
def png() -> bytes:
    """A grey PNG of 4 x 4 pixels."""
    stream = io.BytesIO()
    Image.new("L", (4, 4), 100).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def write_tar() -> WriteTar:
    """Return a function that writes a tar of (member name, bytes)."""

    def write(file: Path, members: Sequence[tuple[str, bytes]]) -> Path:
        with tarfile.open(file, "w") as tar:
            for name, data in members:
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
        return file

    return write


@pytest.fixture
def read_tar() -> ReadTar:
    """Return a reader of a shard by webdataset's grouping (the WebDataset class would leave the file open)."""

    def read(file: Path) -> list[dict[str, Any]]:
        with file.open("rb") as stream:
            return list(group_by_keys(tar_file_expander([{"url": str(file), "stream": stream}])))

    return read
