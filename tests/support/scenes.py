"""A small set of scenes with masks, of three classes and a corner that is to be left out; a class can be told by its colour."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from finetune.config import FinetuneConfig
from foveal.data.indexing.index import index_folder

CLASSES = ("sky", "road", "a car (parked)")
IGNORED = 9
HEIGHT, WIDTH = 24, 32
_COLOURS = np.array([[200, 220, 250], [90, 90, 90], [200, 40, 40]])


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [24, 32, 3] and ids uint8 [24, 32] of a scene."""
    random = np.random.default_rng(number)
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[random.integers(8, 16) :] = 1
    top, left = random.integers(4, 16), random.integers(0, 24)
    ids[top : top + 6, left : left + 8] = 2
    pixels = np.clip(_COLOURS[ids] + random.normal(0, 20, (HEIGHT, WIDTH, 3)), 0, 255)
    ids[:3, :3] = IGNORED
    return pixels.astype(np.uint8), ids


def write_scenes(
    folder: Path, train: int = 16, val: int = 5, classes: tuple[str, ...] | None = CLASSES, stray: int | None = None
) -> Path:
    """Shards of scenes and their index; of the last one of val a pixel may have a ``stray`` id."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(train)), ("val", range(train, train + val))):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for number in numbers:
                pixels, ids = scene(number)
                if stray is not None and number == train + val - 1:
                    ids[-1, -1] = stray
                for name, array in (("png", pixels), ("mask.png", ids)):
                    stream = io.BytesIO()
                    Image.fromarray(array).save(stream, "PNG")
                    header = tarfile.TarInfo(f"{number:03d}.{name}")
                    header.size = stream.tell()
                    stream.seek(0)
                    tar.addfile(header, stream)
    index_folder(str(folder), classes=classes, on_warning=lambda _: None)
    return folder


def scene_tree(folder: Path, **further: Any) -> dict[str, Any]:
    """Settings of a segmentation of them in four steps: windows of 16 pixels on whole images of 24 x 32."""
    data: dict[str, Any] = {
        "path": str(folder),
        "labels": "mask",
        "ignore_id": IGNORED,
        "image_size": 16,
        "eval_size": [HEIGHT, WIDTH],
        "eval_crop_ratio": 1.0,
        "lanes": 4,
        "augment": {"scale": [0.3, 1.0]},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    }
    tree: dict[str, Any] = {
        "seed": 3,
        "epochs": 2,
        "data": data | further.pop("data", {}),
        "batch": {"global_size": 8, "max_micro_size": 4} | further.pop("batch", {}),
        "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 32, "depth": 2, "heads": 2},
        "optim": {"lr_per_256": 6.4e-2, "layer_decay": 0.9, "max_grad_norm": 1.0},
        "drop_path": 0.1,
        "engine": {"kind": "plain"} | further.pop("engine", {}),
        "log": {"every": 1},
        "checkpoint": {"every": 0},
        "run": {"dir": "runs/scenes"},
    }
    return tree | further


def scene_settings(folder: Path, **further: Any) -> FinetuneConfig:
    """As ``scene_tree``, checked."""
    return FinetuneConfig.from_dict(yaml.safe_load(yaml.safe_dump(scene_tree(folder, **further))), "here")
