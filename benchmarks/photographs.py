"""Shards of photographs for benchmarks of the loader: street scenes of CamVid as JPEGs of any size."""

import io
import itertools
import os
import statistics
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from foveal.data.indexing.index import index_folder

SHARDS = 4
QUALITY = 90


def photographs() -> list[Image.Image]:
    """The street scenes of CamVid's training shard, 480 x 360."""
    if "FOVEAL_TEST_DATA" not in os.environ:
        sys.exit("set FOVEAL_TEST_DATA to the folder that holds camvid/train-000000.tar")
    with tarfile.open(Path(os.environ["FOVEAL_TEST_DATA"]) / "camvid" / "train-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        return [Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB") for member in members]  # pyright: ignore[reportOptionalMemberAccess]


def write_photographs(folder: Path, width: int, height: int, count: int) -> float:
    """Shards and a class folder of JPEGs, indexed; their mean size in bytes. Large ones show four scenes."""
    scenes = itertools.cycle(photographs())
    (folder / "files" / "street").mkdir(parents=True)
    samples, across = [], 2 if width > 480 else 1
    for number in range(count):
        sheet = Image.new("RGB", (480 * across, 360 * across))
        for place in range(across**2):
            sheet.paste(next(scenes), (480 * (place % across), 360 * (place // across)))
        stream = io.BytesIO()
        sheet.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=QUALITY)
        samples.append(stream.getvalue())
        (folder / "files" / "street" / f"{number:06d}.jpg").write_bytes(samples[-1])
    write_shards(folder / "shards", "jpg", samples)
    return statistics.mean(map(len, samples))


def write_shards(folder: Path, kind: str, samples: list[bytes]) -> None:
    """Tars of equal length with manifest and index."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(samples)), SHARDS)):
        with (folder / f"train-{number:06d}.tar").open("wb") as stream, TarWriter(stream, encoder=False) as tar:
            for row in rows:
                tar.write({"__key__": f"{row:08d}", kind: samples[row], "cls": b"0"})
    index_folder(str(folder), classes=("street",))
