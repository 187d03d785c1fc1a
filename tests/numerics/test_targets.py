"""What pretraining learns beside pixels: on any machine, resumed, and without it plain masked autoencoding."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, stage_named
from safetensors.torch import load_file

from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.encode import encode_cls_and_patches
from foveal.models.mae import MaskedAutoencoder
from foveal.models.vit import build_encoder
from foveal.optim.schedule import cosine_ema_decay

PRETRAIN = stage_named("pretrain")
SHORT = ("data.samples_per_class=20", "epochs=4", "ema_decay=0.9")  # twelve steps
TARGETS = {
    "latents": ("target=features",),
    "latents and image": ("target=features", "image_loss_weight=0.5", "model.registers=2"),
    "image": ("image_loss_weight=0.5",),
    "image, own": ("image_loss_weight=0.5", "image_target=online"),
}
# Under ZeRO 3 some parameters rest in shards and some stay gathered, also those of an average.
SHARDED = ("engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 40}}",)
# An average is moved in three ways: whole, and in the shards of ZeRO 3 and of FSDP2. What a target is made of, and that
# the parts of a batch add up to it: test_splits.py.
MACHINES = [
    pytest.param("latents and image", ("engine.zero=3", *SHARDED), id="zero 3"),
    pytest.param("latents and image", ("engine.kind=accelerate", "engine.sharding=fsdp2"), id="fsdp2"),
    pytest.param("image", ("engine.zero=2",), marks=pytest.mark.thorough, id="zero 2"),
    pytest.param("image, own", ("engine.kind=accelerate",), marks=pytest.mark.thorough, id="ddp"),
]


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def alone(
    configs: dict[str, Path], one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, list[float]]]:
    """A target in one process, never stopped."""
    found: dict[str, tuple[Path, list[float]]] = {}

    def of(name: str) -> tuple[Path, list[float]]:
        if name not in found:
            run = tmp_path_factory.mktemp("alone") / "run"
            rows = one_rank.train(PRETRAIN, configs["pretrain"], run, *SHORT, *TARGETS[name], "engine.kind=plain")
            assert losses(rows)[-1] < losses(rows)[0]
            found[name] = run, losses(rows)
        return found[name]

    return of


@pytest.mark.parametrize(("target", "engine"), MACHINES)
def test_on_any_machine(
    target: str, engine: tuple[str, ...], alone: Any, configs: dict[str, Path], two_ranks: Ranks, tmp_path: Path
) -> None:
    settings = (*SHORT, *TARGETS[target], *engine, "batch.max_micro_size=16")
    found = losses(two_ranks.train(PRETRAIN, configs["pretrain"], tmp_path / "run", *settings))
    assert found == pytest.approx(alone(target)[1], rel=1e-5)


def test_resumed_is_never_stopped(
    alone: Any, configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Average and all: bit for bit in one process; and on two ranks under ZeRO 3 from where another had stopped."""
    run, settings = tmp_path / "run", (*SHORT, *TARGETS["latents and image"], *SHARDED)
    one_rank.train(PRETRAIN, configs["pretrain"], run, *settings, "engine.kind=plain", "run.stop_at_step=5")
    moved = shutil.copytree(run, tmp_path / "moved")
    rows = one_rank.train(PRETRAIN, configs["pretrain"], run, *settings, "engine.kind=plain")
    whole, expected = alone("latents and image")
    assert losses(rows) == expected
    ours, hers = (load_file(folder / "export" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(ours[name], hers[name]) for name in hers)
    rows = two_ranks.train(PRETRAIN, configs["pretrain"], moved, *settings, "engine.zero=3")
    assert losses(rows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.thorough
def test_a_weight_of_zero_is_plain_masked_autoencoding(
    configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    short = ("data.samples_per_class=20", "epochs=2", "engine.kind=plain")
    plain = one_rank.train(PRETRAIN, configs["pretrain"], tmp_path / "plain", *short)
    zero = one_rank.train(PRETRAIN, configs["pretrain"], tmp_path / "zero", *short, "image_loss_weight=0.0")
    other = one_rank.train(PRETRAIN, configs["pretrain"], tmp_path / "other", *short, "image_loss_weight=1.0e-3")
    assert losses(zero) == losses(plain)
    assert {name for row in zero for name in row} == {name for row in plain for name in row}
    # The head is drawn last: what it stands on begins as it would without it.
    assert other[0]["patch_loss"] == losses(plain)[0]
    assert losses(other) != losses(plain)


def test_the_average_is_one(configs: dict[str, Path], one_rank: Ranks, tmp_path: Path) -> None:
    """After n updates it is the sum that the formula says, of the encoders of all steps."""
    settings = ("data.samples_per_class=20", "epochs=1", "target=features", "ema_decay=0.6", "engine.kind=plain")
    settings += ("checkpoint.every=1", "checkpoint.keep=9")
    one_rank.train(PRETRAIN, configs["pretrain"], tmp_path / "run", *settings)
    average: dict[str, Any] = {}
    steps = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(steps) == 4
    for step, folder in enumerate(steps):
        held = load_file(folder / "pieces-00000.safetensors")
        encoder = {
            name.split(" ")[2].removeprefix("encoder."): value.double()
            for name, value in held.items()
            if name.startswith("weight 0 encoder.")
        }
        keeps = cosine_ema_decay(step, start_decay=0.6, total_steps=3)
        average = {k: keeps * average[k] + (1 - keeps) * v for k, v in encoder.items()} if average else encoder
        for name, value in average.items():
            torch.testing.assert_close(held[f"weight 0 averaged.{name}"].double(), value, rtol=0, atol=1e-7)
    assert cosine_ema_decay(3, start_decay=0.6, total_steps=3) == 1.0


def test_the_average_sees_the_full_image_and_gets_no_gradient() -> None:
    torch.manual_seed(0)
    cfg = VitConfig(patch=4, width=32, depth=2, heads=2)
    encoder = build_encoder(cfg, image_size=16, channels=3)
    small = DecoderConfig(width=16, depth=1, heads=2)
    model = MaskedAutoencoder(encoder, small, predict_features=True, predict_image=True, with_ema=True)
    assert model.averaged is not None
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    guesses = model(images, noise, 0.75)
    assert guesses.target_features is not None
    assert guesses.image_pred is not None
    assert torch.equal(guesses.target_features, encode_cls_and_patches(encoder, images)[1])
    assert guesses.masked_patch_pred.shape == (2, 12, 32)
    (guesses.masked_patch_pred.sum() + guesses.image_pred.sum()).backward()
    assert all(each.grad is None for each in model.averaged.parameters())
    assert all(each.grad is not None for each in model.encoder.parameters() if each.requires_grad)
    assert all(each.grad is not None for each in model.decoder.parameters())
