"""Those who turn tars or folders of JPEGs into batches, each as its own documentation does it. Run by data.py.

    python benchmarks/contenders.py NAME FOLDER OUTPUT CORES

prints a line when it is ready, and then, for every line that it reads, the items, seconds and processor seconds of
one pass over FOLDER.
Every pass starts anew and ends when its last batch is there, so that nothing is done while another contender runs.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# The peers have Pythons of their own, and webdataset does not list what it exports.

import contextlib
import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

BATCH, SIDE = 64, 224
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Pass = Callable[[], int]  # how many items it gave


def ours(folder: Path, output: str, cores: int, modules: Sequence[str] = (), **settings: Any) -> Pass:
    """foveal's training loader; ``float``: normalised on the CPU, where a GPU would do it in a run.

    ``modules``: that its workers import first.
    """
    from foveal.data.config import DataConfig
    from foveal.data.dataset import Dataset
    from foveal.data.image.transforms import normalise
    from foveal.data.loader import train_batches
    from foveal.data.sampling.sources import build_training_set
    from foveal.data.workers import WorkerPool

    pool = WorkerPool(cores, 600.0, modules) if cores > 1 else None
    tree = {"path": str(folder / "shards"), "image_size": SIDE, "lanes": 8, **settings}
    cfg = DataConfig.from_dict({**tree, "mean": MEAN, "std": STD}, "the benchmark")
    training = build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=BATCH)
    epochs = itertools.count()

    def run() -> int:
        start = next(epochs) * training.order.steps_per_epoch
        stop = start + training.order.steps_per_epoch
        count = 0
        with train_batches(
            training,
            cfg,
            rank=0,
            world_size=1,
            microbatch_size=BATCH,
            start_step=start,
            stop_step=stop,
            workers=pool,
        ) as batches:
            for batch in batches:
                images = normalise(batch.images, MEAN, STD) if output == "float" else batch.images
                count += len(images)
        return count

    return run


def ours_full(folder: Path, output: str, cores: int) -> Pass:
    """With the whole JPEG decoded, as all others do."""
    return ours(folder, output, cores, jpeg_scaling=False)


def ours_pillow(folder: Path, output: str, cores: int) -> Pass:
    """Where simplejpeg is not installed."""
    importlib.import_module("pillow_only")
    return ours(folder, output, cores, ["pillow_only"])


def transform(output: str) -> Any:
    """Torchvision's recipe for a PIL image or a uint8 tensor."""
    import torch
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.RandomResizedCrop(SIDE, SCALE, RATIO, InterpolationMode.BICUBIC, antialias=True)
    steps = [crop, v2.RandomHorizontalFlip(), v2.ToImage()]
    if output == "float":
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(steps)


def counted(loader: Iterable[Any]) -> Pass:
    """A pass over a loader whose batches have the images first."""
    return lambda: sum(len(batch[0]) for batch in loader)


def workers(cores: int) -> dict[str, Any]:
    """PyTorch's worker processes: none on one core, kept from pass to pass."""
    return {"num_workers": cores, "persistent_workers": True} if cores > 1 else {"num_workers": 0}


def image_folder(folder: Path, output: str, cores: int) -> Pass:
    """torchvision ImageFolder and v2 transforms."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder / "files"), transform(output))
    return counted(DataLoader(dataset, BATCH, shuffle=True, **workers(cores)))


def shards_of(folder: Path) -> list[str]:
    return sorted(str(file) for file in (folder / "shards").glob("*.tar"))


def _webdataset(folder: Path, cores: int, view: Callable[[Any], Any], *decoders: str) -> Pass:
    import webdataset

    samples = webdataset.WebDataset(shards_of(folder), shardshuffle=100).shuffle(200)
    samples = samples.decode(*decoders) if decoders else samples
    batches = samples.to_tuple("jpg", "cls").map_tuple(view, int).batched(BATCH)
    return counted(webdataset.WebLoader(batches, batch_size=None, **workers(cores)))


def webdataset_pillow(folder: Path, output: str, cores: int) -> Pass:
    """webdataset, ``decode("pil")``, torchvision's transforms."""
    return _webdataset(folder, cores, transform(output), "pil")


def webdataset_simplejpeg(folder: Path, output: str, cores: int) -> Pass:
    """webdataset, simplejpeg, torchvision's transforms on uint8 tensors."""
    import simplejpeg
    import torch

    then = transform(output)
    return _webdataset(
        folder, cores, lambda data: then(torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1))
    )


def litdata(folder: Path, output: str, cores: int) -> Pass:
    """litdata's own chunks, made from the files, and its loader."""
    import litdata

    made = folder / "litdata"
    if not made.exists():
        files = sorted(str(file) for file in (folder / "files").rglob("*.jpg"))
        litdata.optimize(sample_of, files, str(made), chunk_bytes="64MB", num_workers=1, verbose=False)
    dataset = litdata.StreamingDataset(str(made), shuffle=True, transform=partial(seen, transform(output)))
    return counted(litdata.StreamingDataLoader(dataset, batch_size=BATCH, **workers(cores)))


def seen(view: Callable[[Any], Any], sample: dict[str, Any]) -> tuple[Any, Any]:
    """What a sample of litdata or streaming becomes."""
    return view(sample["image"]), sample["class"]


def sample_of(file: str) -> dict[str, Any]:
    """A file as litdata and streaming take it: they keep its bytes."""
    from PIL import Image

    return {"image": Image.open(file), "class": 0}


def streaming(folder: Path, output: str, cores: int) -> Pass:
    """mosaicml-streaming's own shards, made from the files, and PyTorch's loader."""
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    made = folder / "mds"
    if not made.exists():
        with MDSWriter(out=str(made), columns={"image": "jpeg", "class": "int"}) as writer:
            for file in sorted((folder / "files").rglob("*.jpg")):
                writer.write(sample_of(str(file)))
    then = transform(output)

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return seen(then, super().__getitem__(index))

    return counted(DataLoader(Images(local=str(made), batch_size=BATCH, shuffle=True), BATCH, **workers(cores)))


def dali(folder: Path, output: str, cores: int) -> Pass:
    """NVIDIA DALI on the CPU: its reader of tars, its decoder of crops."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=cores, device_id=None, exec_async=False, exec_pipelined=False)
    def pipeline() -> Any:
        images, labels = fn.readers.webdataset(
            paths=shards_of(folder), ext=["jpg", "cls"], random_shuffle=True, initial_fill=200, name="reader"
        )
        images = fn.decoders.image_random_crop(images, random_area=SCALE, random_aspect_ratio=RATIO)
        images = fn.resize(images, size=(SIDE, SIDE), interp_type=types.DALIInterpType.INTERP_CUBIC)
        kind = types.DALIDataType.FLOAT if output == "float" else types.DALIDataType.UINT8
        scales = {"mean": [255 * x for x in MEAN], "std": [255 * x for x in STD]} if output == "float" else {}
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(images, mirror=mirror, dtype=kind, output_layout="CHW", **scales), labels

    made = pipeline()
    made.build()
    rounds = made.epoch_size("reader") // BATCH

    def run() -> int:
        return sum(len(torch.from_numpy(made.run()[0].as_array())) for _ in range(rounds))

    return run


def ours_bytes(folder: Path, *_: Any) -> Pass:
    """foveal: image and label of every sample, by offset, in the shuffled order of training."""
    from foveal.data.config import DataConfig
    from foveal.data.dataset import Dataset
    from foveal.data.sampling.sources import build_training_set

    tree = {"path": str(folder / "shards"), "image_size": SIDE, "lanes": 8}
    cfg = DataConfig.from_dict(tree, "the benchmark")
    dataset = Dataset.open(cfg)
    training = build_training_set(dataset, cfg, seed=0, batch_size=1000)

    def run() -> int:
        count = 0
        for step in range(training.order.steps_per_epoch):
            for draw in training.sample_keys(training.order.assign_slots(step, 0, 1000)):
                place = training.locate_sample(int(draw))
                index = place.shard_index
                data, label = (
                    dataset.read_bytes(index.shard, *index.find_image_offset_size(place.index_row)),
                    index.labels[place.index_row],
                )
                count += len(data) > 0 and int(label) >= 0
        return count

    return run


def webdataset_bytes(folder: Path, *_: Any) -> Pass:
    """webdataset: the raw fields of every sample, shards in their order."""
    import webdataset

    return lambda: sum(
        len(sample["png"]) > 0 for sample in webdataset.WebDataset(shards_of(folder), shardshuffle=False)
    )


def tarfile_bytes(folder: Path, *_: Any) -> Pass:
    """Python's tarfile: the bytes of every member, in their order."""

    def run() -> int:
        count = 0
        for shard in shards_of(folder):
            with tarfile.open(shard) as tar:
                for member in tar:
                    data = tar.extractfile(member)
                    count += bool(data and data.read()) and member.name.endswith(".png")
        return count

    return run


CONTENDERS: dict[str, tuple[Callable[..., Pass], str]] = {  # and the package whose version is told
    "foveal": (ours, "foveal"),
    "foveal, whole JPEGs": (ours_full, "foveal"),
    "foveal, Pillow only": (ours_pillow, "pillow"),
    "torchvision ImageFolder": (image_folder, "torchvision"),
    "webdataset + PIL": (webdataset_pillow, "webdataset"),
    "webdataset + simplejpeg": (webdataset_simplejpeg, "simplejpeg"),
    "DALI (CPU)": (dali, "nvidia-dali-cuda120"),
    "litdata": (litdata, "litdata"),
    "streaming": (streaming, "mosaicml-streaming"),
    "foveal: bytes": (ours_bytes, "foveal"),
    "webdataset: bytes": (webdataset_bytes, "webdataset"),
    "tarfile: bytes": (tarfile_bytes, "foveal"),
}


def main() -> None:
    name, folder, output, cores = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to where answers are expected
    os.dup2(2, 1)
    if cores == "1":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    start, package = CONTENDERS[name]
    try:
        run = start(Path(folder), output, int(cores))
        run()  # what is made once, and the page cache
    except ImportError as error:
        answers.write(json.dumps({"absent": str(error)}) + "\n")
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package = f"{package} {importlib.metadata.version(package)}"
    answers.write(json.dumps({"ready": package}) + "\n")
    for _ in sys.stdin:
        began, busy = time.perf_counter(), time.process_time()
        items = run()
        seconds, processor = time.perf_counter() - began, time.process_time() - busy
        answers.write(json.dumps({"items": items, "seconds": seconds, "processor": processor}) + "\n")


if __name__ == "__main__":
    main()
