"""A picture with its words: a PNG file carries its title and its alternative text (PNG specification, tEXt chunks)."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from foveal.atomic import write_atomic

_TITLE, _DESCRIPTION = "Title", "Description"  # keywords that the PNG specification registers


@dataclass(frozen=True)
class Picture:
    """An image, its title of a few words, and its description: what it shows, for those who do not see it."""

    image: Image.Image
    title: str
    description: str


def save_picture(file: Path, picture: Picture) -> None:
    """Write a picture as PNG, completely or not at all. Raises: OSError."""
    words = PngImagePlugin.PngInfo()
    words.add_itxt(_TITLE, picture.title)
    words.add_itxt(_DESCRIPTION, picture.description)
    stream = io.BytesIO()
    picture.image.save(stream, "PNG", pnginfo=words)
    write_atomic(file, stream.getvalue())


def read_title_and_description(file: Path) -> tuple[str, str]:
    """Return the words of a PNG file; empty where it has none. Raises: OSError if it is no image."""
    with Image.open(file) as image:
        words = getattr(image, "text", {})
        return str(words.get(_TITLE, "")), str(words.get(_DESCRIPTION, ""))
