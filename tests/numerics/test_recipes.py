"""Every way to fine-tune that draws something: the same curve on any ranks, and after any stop."""

from pathlib import Path

import pytest
from ranks import Ranks, stage_named
from safetensors.torch import load_file

STAGE = stage_named("finetune")
FEW = ("data.samples_per_class=26", "epochs=2", "evaluate_every=3")  # eight steps
# Everything at once: whoever shares a draw with another sample, or takes one from a generator, shows in some step.
ALL = (
    *(
        "mixup=0.8",
        "cutmix=1.0",
        "random_erasing=0.5",
        "dropout=0.2",
        "ema_decay=0.9",
        "data.augment.rand_augment.ops=2",
    ),
    *("class_weights=[1, 2, 1, 1, 1, 1, 1, 1, 0.5, 1]", "adversarial={epsilon: 8, step_size: 3, steps: 2}"),
    "teacher={init: TEACHER, weight: 0.3}",
)
PLAIN = ("engine.kind=plain", "batch.max_micro_size=64")
MACHINES = {
    "ddp": ("engine.kind=accelerate", "batch.max_micro_size=16"),
    "fsdp2": ("engine.kind=accelerate", "engine.sharding=fsdp2", "batch.max_micro_size=32"),
}


@pytest.fixture(scope="module")
def everything(
    configs: dict[str, Path], one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, ...], Path, list[dict[str, float]]]:
    """The settings with a teacher that was fine-tuned for a moment, the run under Plain, and its rows."""
    folder = tmp_path_factory.mktemp("recipes")
    one_rank.train(STAGE, configs["finetune"], folder / "teacher", "engine.kind=plain", "data.samples_per_class=26")
    words = (*FEW, *(word.replace("TEACHER", str(folder / "teacher" / "export")) for word in ALL))
    return words, folder / "alone", one_rank.train(STAGE, configs["finetune"], folder / "alone", *words, *PLAIN)


@pytest.mark.parametrize("machine", [pytest.param("ddp", marks=pytest.mark.thorough), "fsdp2"])
def test_one_curve(
    machine: str, everything: tuple[tuple[str, ...], Path, list[dict[str, float]]], configs: dict[str, Path],
    two_ranks: Ranks, tmp_path: Path,
) -> None:  # fmt: skip
    words, folder, expected = everything
    engine = MACHINES[machine]
    rows = two_ranks.train(STAGE, configs["finetune"], tmp_path / "run", *words, *engine)
    names = ("loss", "grad_norm", "adversarial_loss", "teacher_loss", "val_loss", "val_robust_top1")
    for name in names:
        found, wanted = ([row[name] for row in each if name in row] for each in (rows, expected))
        assert found == pytest.approx(wanted, rel=2e-5), name
        assert found, f"{name} is told"
    ours, theirs = (load_file(each / "export" / "model.safetensors") for each in (tmp_path / "run", folder))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() < 1e-4, name


@pytest.mark.thorough
def test_a_token_that_learns_from_a_teacher(
    everything: tuple[tuple[str, ...], Path, list[dict[str, float]]], configs: dict[str, Path],
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path,
) -> None:  # fmt: skip
    """DeiT's, beside all else, on the first register: the same curve, and an export that has no trace of its head."""
    words = [word.replace("weight: 0.3", "weight: 0.3, kind: token") for word in everything[0]]
    words += [
        "init=null",
        "pooling=token",
        "model={name: vit_tiny_patch16_224, patch: 4, registers: 1, width: 16, depth: 2, heads: 2}",
    ]
    alone = one_rank.train(STAGE, configs["finetune"], tmp_path / "alone", *words, *PLAIN)
    rows = two_ranks.train(STAGE, configs["finetune"], tmp_path / "run", *words, *MACHINES["ddp"])
    for name in ("loss", "grad_norm", "teacher_loss", "val_loss"):
        found, wanted = ([row[name] for row in each if name in row] for each in (rows, alone))
        assert found == pytest.approx(wanted, rel=2e-5), name
    assert alone[-1] != everything[2][-1]
    assert not any("dist" in name for name in load_file(tmp_path / "run" / "export" / "model.safetensors"))


def test_stopping_changes_nothing(
    everything: tuple[tuple[str, ...], Path, list[dict[str, float]]], configs: dict[str, Path],
    one_rank: Ranks, tmp_path: Path,
) -> None:  # fmt: skip
    words, folder, whole = everything
    for stop in ("run.stop_at_step=3", "run.stop_at_step=7", "seed=3"):
        rows = one_rank.train(STAGE, configs["finetune"], tmp_path / "run", *words, *PLAIN, stop)
    for name in ("lr", "loss", "grad_norm", "val_loss", "val_robust_top1"):
        assert [row[name] for row in rows if name in row] == [row[name] for row in whole if name in row], name
    ours, theirs = (load_file(each / "export" / "model.safetensors") for each in (tmp_path / "run", folder))
    assert all(ours[each].equal(theirs[each]) for each in theirs)


@pytest.mark.thorough
def test_what_is_evaluated_and_exported_is_the_average(
    everything: tuple[tuple[str, ...], Path, list[dict[str, float]]], configs: dict[str, Path],
    one_rank: Ranks, tmp_path: Path,
) -> None:  # fmt: skip
    words, folder, _ = everything
    rows = one_rank.train(STAGE, configs["finetune"], tmp_path / "run", *words, *PLAIN, "ema_decay=null")
    with_average = load_file(folder / "export" / "model.safetensors")
    without = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert with_average.keys() == without.keys()
    assert not with_average["head.weight"].equal(without["head.weight"])
    # The average changes no step of the training.
    losses = [[row["loss"] for row in each if "loss" in row] for each in (rows, everything[2])]
    assert losses[0] == losses[1]


@pytest.mark.thorough
def test_a_frozen_encoder_stays_as_it_was(
    configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    words = (*FEW, "freeze_encoder=true", "drop_path=0", "dropout=0.1")
    alone = one_rank.train(STAGE, configs["finetune"], tmp_path / "alone", *words, *PLAIN)
    rows = two_ranks.train(STAGE, configs["finetune"], tmp_path / "run", *words, "engine.kind=accelerate")
    losses = [[row["loss"] for row in each if "loss" in row] for each in (rows, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    before = load_file(configs["pretrain"].parent / "teacher" / "export" / "model.safetensors")
    after = load_file(tmp_path / "alone" / "export" / "model.safetensors")
    assert all(after[name].equal(before[name]) for name in before if name in after)
    assert after["head.weight"].abs().max() > 1e-3, "the head began a hundred times smaller, and learned"


@pytest.mark.thorough
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_networks_with_norms_of_their_own_for_attacked_images(
    sharding: str, configs: dict[str, Path], two_ranks: Ranks, tmp_path: Path
) -> None:
    """Stopped and continued on two ranks, bit for bit; the export has the names of the network and no twins."""
    words = ("backbone=test_resnet", "init=null", "data.samples_per_class=26", "engine.kind=accelerate", "drop_path=0")
    words += (f"engine.sharding={sharding}", "adversarial={attack: fgsm, separate_batchnorm: true, epsilon: 8}")
    whole = two_ranks.train(STAGE, configs["finetune"], tmp_path / "whole", *words)
    two_ranks.train(STAGE, configs["finetune"], tmp_path / "parts", *words, "run.stop_at_step=2")
    parts = two_ranks.train(STAGE, configs["finetune"], tmp_path / "parts", *words)
    for name in ("loss", "adversarial_loss", "val_robust_top1"):
        assert [row[name] for row in parts if name in row] == [row[name] for row in whole if name in row], name
    ours, theirs = (load_file(tmp_path / each / "export" / "model.safetensors") for each in ("parts", "whole"))
    assert all(ours[each].equal(theirs[each]) for each in theirs)
    assert not any("twin" in name or "attacked" in name for name in ours)
