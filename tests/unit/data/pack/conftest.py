"""Folders of tiny images."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes images at paths below tmp_path, each of another colour, and returns the folder."""
    count = iter(range(1 << 24))

    def write(folder: str, *names: str) -> Path:
        for name in names:
            number = next(count)
            stream = io.BytesIO()
            colour = (number % 256, number // 256 % 256, 100)
            Image.new("RGB", (2, 2), colour).save(stream, "PNG")
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(stream.getvalue())
        return tmp_path / folder

    return write
