"""The pictures of a run for a page: PNG files with their words, as data URLs, within a budget of bytes."""

import base64
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from foveal.inspect.picture import read_title_and_description

_NAME_AND_STEP = re.compile(r"(.+)-(\d{8,})")
_MAX_EARLIER = 12
_MAX_BYTES = 400_000  # of a picture as it is; a larger one is reduced
_MAX_SIDE = 1600
_MAX_PIXELS = 120_000_000  # of a picture that is opened


@dataclass(frozen=True)
class PagePicture:
    """A picture of a page. url: a data URL; "" if it is left out, and ``note`` says why. step: None for one of no step."""

    name: str
    title: str
    description: str
    step: int | None
    file: Path
    width: int = 0
    height: int = 0
    url: str = ""
    note: str = ""


@dataclass(frozen=True)
class PictureStrip:
    """The newest picture of a name, and earlier ones, thinned. num_earlier: before the thinning."""

    newest: PagePicture
    earlier: tuple[PagePicture, ...]
    num_earlier: int


class PictureBudget:
    """The bytes that the pictures of a page may take together."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def embed(self, file: Path) -> PagePicture:
        """Return a picture as a data URL, reduced if it is large, or a note that it is left out."""
        match = _NAME_AND_STEP.fullmatch(file.stem)
        name, step = (match[1], int(match[2])) if match else (file.stem, None)
        try:
            title, description = read_title_and_description(file)
            with Image.open(file) as image:
                width, height = image.size
            content, kind = _read_or_reduce(file, width, height)
        except (OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
            return PagePicture(name, name, "", step, file, note=f"cannot be read ({type(error).__name__})")
        words = (
            name,
            title or name,
            description or f"{title or name}, without a description",
            step,
            file,
            width,
            height,
        )
        if len(content) > self._left:
            return PagePicture(*words, note="left out, because the page would be too large")
        self._left -= len(content)
        return PagePicture(*words, url=f"data:image/{kind};base64,{base64.b64encode(content).decode()}")


def collect_strips(files: Iterable[Path], budget: PictureBudget) -> tuple[PictureStrip, ...]:
    """Return the pictures by name. The newest ones are embedded before the earlier ones, which the budget may not allow."""
    by_name: dict[str, list[tuple[int, Path]]] = {}
    for file in files:
        match = _NAME_AND_STEP.fullmatch(file.stem)
        by_name.setdefault(match[1] if match else file.stem, []).append((int(match[2]) if match else 0, file))
    ordered = {name: [file for _, file in sorted(found)] for name, found in by_name.items()}
    newest = {name: budget.embed(found[-1]) for name, found in ordered.items()}
    return tuple(
        PictureStrip(newest[name], tuple(budget.embed(file) for file in _thin(found[:-1])), len(found) - 1)
        for name, found in ordered.items()
    )


def _thin(files: list[Path]) -> list[Path]:
    if len(files) <= _MAX_EARLIER:
        return files
    return [files[round(at * (len(files) - 1) / (_MAX_EARLIER - 1))] for at in range(_MAX_EARLIER)]


def _read_or_reduce(file: Path, width: int, height: int) -> tuple[bytes, str]:
    """Return the bytes of a PNG file, or of a smaller WebP of a large one, and the kind. Raises: OSError, ValueError."""
    if file.stat().st_size <= _MAX_BYTES:
        return file.read_bytes(), "png"
    if width * height > _MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels")
    with Image.open(file) as image:
        reduced = image.convert("RGB")
    reduced.thumbnail((_MAX_SIDE, _MAX_SIDE))
    stream = io.BytesIO()
    reduced.save(stream, "WEBP", quality=85)
    return stream.getvalue(), "webp"
