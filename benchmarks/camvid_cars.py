"""Shards of street scenes with a box around every car, from the masks of the test data's CamVid.

    FOVEAL_TEST_DATA=FOLDER python benchmarks/camvid_cars.py data/camvid_cars

A box is that of a connected piece of the class Car, as COCO's annotations have it: cars that hide one another share one,
and a car behind a pole has two, so that a perfect detector of cars would not find them all. Pieces of less than AREA
pixels (of 480 x 360) are left out.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from webdataset import WebDataset
from webdataset.writer import TarWriter

from foveal.data.indexing.index import index_folder

CAR = 8  # its id in the masks
AREA = 200  # pixels
SOURCE = "FOVEAL_TEST_DATA"


def boxes(mask: bytes) -> list[dict[str, object]]:
    """COCO's annotations of the cars in a mask."""
    pieces, _ = ndimage.label(np.asarray(Image.open(io.BytesIO(mask))) == CAR)
    areas = np.bincount(pieces.ravel())[1:].tolist()
    found = []
    for (down, across), area in zip(ndimage.find_objects(pieces), areas, strict=True):
        if area >= AREA:
            bbox = [across.start, down.start, across.stop - across.start, down.stop - down.start]
            found.append({"bbox": bbox, "category_id": 0})
    return found


def scenes(shard: Path) -> Iterator[dict[str, bytes | str]]:
    """The samples of a shard, with boxes for masks."""
    for sample in WebDataset(str(shard), shardshuffle=False):
        annotations = boxes(sample["mask.png"])
        yield {"__key__": sample["__key__"], "jpg": sample["jpg"], "json": json.dumps(annotations).encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the shards go")
    folder = parser.parse_args().folder
    if SOURCE not in os.environ:
        sys.exit(f"set {SOURCE} to the folder that camvid/ is in")
    folder.mkdir(parents=True, exist_ok=True)
    for shard in sorted(Path(os.environ[SOURCE], "camvid").glob("*.tar")):
        count = images = 0
        with TarWriter(str(folder / shard.name), mtime=0) as writer:
            for sample in scenes(shard):
                writer.write(sample)
                images += 1
                count += len(json.loads(sample["json"]))
        print(f"{shard.name}: {images} images, {count} boxes")
    index_folder(str(folder), classes=("car",), on_warning=print)


if __name__ == "__main__":
    main()
