"""Images of rectangles that can be found: light ones and dark ones on noise, and some images without any."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from foveal.data.indexing.index import index_folder

CLASSES = ("light", "dark")
EMPTY = 4  # every so many images have no box


def scene(number: int, side: int) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Pixels uint8 [side, side] and COCO's annotations of them."""
    draw = np.random.default_rng(number)
    pixels, boxes = draw.integers(110, 146, (side, side)).astype(np.uint8), []
    for label in range(0 if number % EMPTY == EMPTY - 1 else 1 + number % 2):
        width, height = draw.integers(side // 4, side // 2, 2).tolist()
        left, top = draw.integers(0, side - width), draw.integers(0, side - height)
        kind = int((number // 2 + label) % 2)
        pixels[top : top + height, left : left + width] = (240, 15)[kind]
        boxes.append({"bbox": [int(left), int(top), width, height], "category_id": kind})
    return pixels, boxes


def pack_rectangles(folder: Path, train: int = 32, val: int = 10, side: int = 32) -> Path:
    """Shards of so many images of each split, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, begin, count in (("train", 0, train), ("val", train, val)):
        with TarWriter(str(folder / f"{split}-000000.tar")) as shard:
            for number in range(begin, begin + count):
                pixels, boxes = scene(number, side)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "PNG")
                shard.write({"__key__": f"{number:04d}", "png": stream.getvalue(), "json": json.dumps(boxes).encode()})
    index_folder(str(folder), classes=CLASSES, on_warning=lambda _: None)
    return folder
