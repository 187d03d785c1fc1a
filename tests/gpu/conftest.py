"""What a machine with GPUs runs first: ranks on one, two, four and eight GPUs, each pool started once, and runs to train.

``make gpu`` starts it. A test skips with a reason where the machine has too few GPUs or lacks a library. With
``--on-cpus`` processes on CPUs take the place of GPUs: the tests themselves are tried, except what only a GPU shows.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from pictures import encoded, photo
from ranks import PATIENCE, Ranks
from runs_on_gpus import Row, Training

from foveal.data.indexing.index import index_folder

IMAGES, SIDE = 256, 32  # an epoch of 8 steps of 32 images
_SECONDS_ON_CPUS = 1500.0  # of a test


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Eight ranks on two cores take minutes to start, and bf16 on most CPUs is ten times as slow as fp32."""
    if config.getoption("--on-cpus"):
        for item in (item for item in items if item.path.parent == Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(_SECONDS_ON_CPUS))


@pytest.fixture(scope="session")
def num_gpus(request: pytest.FixtureRequest) -> int:
    """The GPUs of this machine; eight where processes on CPUs take their place."""
    if hasattr(request.config, "workerinput"):
        pytest.skip("make gpu runs it, in one process: two would share the GPUs")
    if request.config.getoption("--on-cpus"):
        return 8
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.fixture(scope="session")
def patience(request: pytest.FixtureRequest) -> float:
    """Seconds for one call of ranks."""
    return _SECONDS_ON_CPUS if request.config.getoption("--on-cpus") else PATIENCE


@pytest.fixture(scope="session")
def ranks_on(num_gpus: int, patience: float) -> Iterator[Callable[[int], Ranks]]:
    """Return ranks on so many GPUs, one each; skip where there are fewer."""
    pools: dict[int, Ranks] = {}
    with ExitStack() as stack:

        def ranks(size: int) -> Ranks:
            if size > num_gpus:
                pytest.skip(f"needs {size} {'GPU' if size == 1 else 'GPUs'}, and here is {num_gpus}")
            if size not in pools:
                pools[size] = Ranks(size, patience)
                stack.callback(pools[size].close)
            return pools[size]

        yield ranks


@pytest.fixture
def one_gpu(ranks_on: Callable[[int], Ranks]) -> Ranks:
    return ranks_on(1)


@pytest.fixture
def two_gpus(ranks_on: Callable[[int], Ranks]) -> Ranks:
    return ranks_on(2)


@pytest.fixture
def eight_gpus(ranks_on: Callable[[int], Ranks]) -> Ranks:
    return ranks_on(8)


@pytest.fixture
def cuda(num_gpus: int, request: pytest.FixtureRequest) -> torch.device:
    """The first GPU, for what no CPU can take the place of."""
    if request.config.getoption("--on-cpus"):
        pytest.skip("only a GPU shows it")
    if num_gpus == 0:
        pytest.skip("needs 1 GPU, and here is 0")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def one_cpu(patience: float) -> Iterator[Ranks]:
    """A rank on the CPU, whatever GPUs there are."""

    class CpuRanks(Ranks):
        def _start(self) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
                super()._start()

    ranks = CpuRanks(1, patience)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small masked autoencoder on tiles of a picture; shards and index are written without webdataset."""
    folder = tmp_path_factory.mktemp("gpu")
    shards = folder / "tiles"
    shards.mkdir()
    per_row = 16
    picture = photo(per_row * SIDE, IMAGES // per_row * SIDE)
    with tarfile.open(shards / "train-000000.tar", "w") as shard:
        for number in range(IMAGES):
            left, top = number % per_row * SIDE, number // per_row * SIDE
            tile = encoded(picture.crop((left, top, left + SIDE, top + SIDE)), "PNG")
            for name, content in (("png", tile), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{name}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    index_folder(str(shards), classes=("even", "odd"), on_warning=lambda _: None)
    tree = {
        "seed": 3,
        "epochs": 3,
        "data": {"path": str(shards), "image_size": SIDE, "lanes": 8, "mean": [0.5] * 3, "std": [0.2] * 3},
        "batch": {"global_size": 32, "max_micro_size": 32},
        "optim": {"lr_per_256": 4.0e-3, "warmup_epochs": 1, "max_grad_norm": 1.0},
        "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 96, "depth": 4, "heads": 3},
        "decoder": {"width": 48, "depth": 2, "heads": 3},
        "engine": {"kind": "plain"},
        "log": {"every": 4, "images_every": 0},
        "checkpoint": {"every": 0},
    }
    file = folder / "tiles.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture
def train(config: Path, tmp_path: Path) -> Training:
    return Training(config, tmp_path)


@pytest.fixture(scope="session")
def reference(
    config: Path, one_cpu: Ranks, ranks_on: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Row]]:
    """Return the rows of the whole run on "cpu" or "gpu", under the plain engine, trained once."""
    curves: dict[tuple[str, ...], list[Row]] = {}

    def rows(device: str, *overrides: str) -> list[Row]:
        if (device, *overrides) not in curves:
            training = Training(config, tmp_path_factory.mktemp("reference"))
            ranks = one_cpu if device == "cpu" else ranks_on(1)
            curves[device, *overrides] = training(ranks, "run", *overrides)
        return curves[device, *overrides]

    return rows
