"""Models of timm as they are, through fine-tuning: engines, stopping, other ranks, and a start from an export of one."""

from pathlib import Path

import pytest
import torch
from ranks import Ranks, stage_named
from safetensors.torch import load_file
from torch import nn

from foveal.distributed.world import World
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.models.backbone import backbone_card, backbone_from_card, build_backbone
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups
from foveal.weights.export import Card, read_card, write_export

STAGE = stage_named("finetune")
SWIN = "swin_tiny_patch4_window7_224"
SCRATCH = ("init=null", "data.samples_per_class=26", "drop_path=0.1")  # four steps
MACHINES = {
    "plain": ("one", "resnet18", "engine.kind=plain"),
    "ddp": ("two", "test_resnet", "engine.kind=accelerate", "batch.max_micro_size=16"),
    "fsdp2": ("two", "test_resnet", "engine.kind=accelerate", "engine.sharding=fsdp2", "batch.max_micro_size=16"),
    "zero2": (
        *("two", "test_resnet", "engine.kind=accelerate", "engine.sharding=deepspeed"),
        *("engine.zero=2", "batch.max_micro_size=16"),
    ),
}


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    "machine", [pytest.param(each, marks=() if each == "ddp" else pytest.mark.thorough) for each in MACHINES]
)
def test_a_network_with_batch_norm_goes_on_where_it_stopped(
    machine: str, configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Bit for bit: rows, evaluations, and the export with its running statistics. They count all micros of rank 0."""
    ranks, name, *engine = MACHINES[machine]
    world, words = {"one": one_rank, "two": two_ranks}[ranks], (f"backbone={name}", *SCRATCH, *engine)
    whole = world.train(STAGE, configs["finetune"], tmp_path / "whole", *words, "evaluate_every=2")
    world.train(STAGE, configs["finetune"], tmp_path / "parts", *words, "evaluate_every=2", "run.stop_at_step=3")
    parts = world.train(STAGE, configs["finetune"], tmp_path / "parts", *words, "evaluate_every=2")
    for key in ("step", "loss", "grad_norm", "lr", "val_top1", "val_loss"):
        assert [row[key] for row in parts if key in row] == [row[key] for row in whole if key in row], key
    ours, theirs = (load_file(tmp_path / each / "export" / "model.safetensors") for each in ("parts", "whole"))
    assert ours.keys() == theirs.keys() == build_backbone(name, 16, 1, num_classes=10).state_dict().keys()
    assert all(ours[each].equal(theirs[each]) for each in ours)
    counted = ours["bn1.num_batches_tracked"]
    assert (counted.dtype, int(counted)) == (torch.int64, 8)


def _statistics(world: World, sharding: str) -> tuple[list[float], list[float]]:
    """A running mean after a step on other rows than the other rank's, and as an evaluation meets it."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    model, optim = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 1)), OptimConfig()
    cfg = EngineConfig.from_dict({"kind": "accelerate", "sharding": sharding}, "here")
    engine = build_engine(
        model, parameter_groups(model, optim), optim, cfg, world, microbatch_size=8, accumulation_steps=1
    )
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(world.rank)).to(world.device)
    engine.set_lr(1e-2)
    with engine.microbatch(last=True):
        engine.backward(engine.model(rows).square().mean())
    engine.step()
    assert norm.running_mean is not None
    own = norm.running_mean.tolist()
    with engine.eval_mode():
        engine.model(rows)
    return own, norm.running_mean.tolist()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "deepspeed"])
def test_an_evaluation_is_by_one_model(sharding: str, two_ranks: Ranks) -> None:
    """Ranks have seen other images, and their running statistics are others; all evaluate with rank 0's."""
    (first, met), (second, met_too) = two_ranks.call(_statistics, sharding)
    assert first != second
    assert met == met_too == first


@pytest.mark.thorough
def test_a_network_without_batch_norm_has_one_curve(
    configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Drop path and all: it is drawn by sample, also in a model that is timm's own."""
    words = (f"backbone={SWIN}", *SCRATCH, "optim.lr_per_256=1e-3", "data.image_size=32", "batch.global_size=16")
    words = (*words, "run.stop_at_step=2")
    alone = one_rank.train(STAGE, configs["finetune"], tmp_path / "alone", *words, "engine.kind=plain")
    fsdp2 = ("engine.kind=accelerate", "engine.sharding=fsdp2", "batch.max_micro_size=4")
    shared = two_ranks.train(STAGE, configs["finetune"], tmp_path / "fsdp2", *words, *fsdp2)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.thorough
def test_fine_tuning_goes_on_from_a_student_that_is_a_backbone(
    configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """An export without a head, of larger images, as distillation leaves it; then from the classifier that it became."""
    torch.manual_seed(1)
    student = build_backbone("test_resnet", 32, 1)
    card = Card("distill", backbone_card("test_resnet", 32, 1), (0.3,), (0.4,))
    write_export(tmp_path / "student", student.state_dict(), card)
    words = ("data.samples_per_class=26",)  # four steps
    for init, run, ranks in (
        (tmp_path / "student", "first", two_ranks),
        (tmp_path / "first" / "export", "second", one_rank),
    ):
        rows = ranks.train(STAGE, configs["finetune"], tmp_path / run, f"init={init}", *words)
        assert all(0 < loss < 20 for loss in losses(rows))
        told = read_card(tmp_path / run / "export")
        assert told.encoder == backbone_card("test_resnet", 16, 1, 10)
        assert (told.mean, told.classes) == ((0.3,), tuple("0123456789"))
        assert told.resized_from == (32 if run == "first" else None)
        backbone_from_card(told.encoder, "card").load_state_dict(
            load_file(tmp_path / run / "export" / "model.safetensors")
        )
