"""What tests share: tiny settings on real digits, and worlds of one and two ranks that live for the session."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ranks import Ranks, stage_named

from foveal.data.pack import pack_digits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regolden", action="store_true", help="rewrite tests/numerics/golden/*.json; review the diff like code"
    )
    parser.addoption("--write-durations", action="store_true", help="write tests/durations.json from this run")
    parser.addoption(
        "--on-cpus", action="store_true", help="tests/gpu: processes on CPUs take the place of eight GPUs, under gloo"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings

        # Both count seconds, of which a busy machine may take any number.
        settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("patient")
    if not config.pluginmanager.hasplugin("xdist"):
        return  # tests/gpu needs none
    from tiers import Recording, Sharing

    config.pluginmanager.register(Sharing())
    if config.getoption("--write-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recording())


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as shards, packed once."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack_digits(folder)
    return folder


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """The command line and some tests make foveal's log say more; the next test finds it as it was."""
    log = logging.getLogger("foveal")
    before = log.level
    yield
    log.setLevel(before)


@pytest.fixture
def own_environment() -> Iterator[None]:
    """Joining a world sets RANK and others for the libraries to read; the next test finds them as they were."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def configs(digits: Path, one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny config of each stage, by name; the last two start from an encoder pretrained for an epoch."""
    folder = tmp_path_factory.mktemp("configs")
    data = {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 8}
    vit = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 32, "depth": 2, "heads": 2}
    shared = {
        "seed": 3,
        "epochs": 1,
        "data": data,
        "batch": {"global_size": 64, "max_micro_size": 32},
        "optim": {"lr_per_256": 4.0e-3, "warmup_epochs": 0.2, "max_grad_norm": 1.0},
        "log": {"every": 5},
        "checkpoint": {"every": 0},
    }
    trees = {
        "pretrain": shared | {"model": vit, "decoder": {"width": 16, "depth": 1, "heads": 2}},
        "distill": shared | {"model": vit | {"width": 16}, "teacher": str(folder / "teacher" / "export")},
        "finetune": shared
        | {"init": str(folder / "teacher" / "export"), "drop_path": 0.1, "label_smoothing": 0.1}
        | {"optim": {"lr_per_256": 4.0e-2, "layer_decay": 0.9}},
    }
    files = {name: folder / f"{name}.yaml" for name in trees}
    for name, tree in trees.items():
        files[name].write_text(yaml.safe_dump(tree))
    one_rank.train(stage_named("pretrain"), files["pretrain"], folder / "teacher", "engine.kind=plain")
    return files
