"""Every kind of lesson: one curve on any machine, resumed bit for bit, and students that do not notice each other."""

import json
from pathlib import Path

import pytest
import timm
import torch
from ranks import Ranks, stage_named
from safetensors.torch import load_file, save_file
from teachers import DIGITS, LESSONS, STUDENT, encoder_export
from torch import Tensor

from distill.target import TeacherTarget
from distill.teacher import Teacher
from distill.teacher_cache import TeacherCache, TensorSpec
from foveal.errors import ConfigError
from foveal.weights.export import read_export

SHORT = ("data.samples_per_class=20",)  # three steps
PLAIN = "engine.kind=plain"
THOROUGH = pytest.mark.thorough
ZERO_3 = ("engine.zero=3", "batch.max_micro_size=16")
DDP = ("engine.kind=accelerate",)
FSDP_2 = ("engine.kind=accelerate", "engine.sharding=fsdp2", "batch.max_micro_size=16")
# One each: that the parts of a batch add up is test_splits.py's, and what an engine makes of it test_any_machine.py's.
# What opens an encoder is tried under FSDP2 too, whose blocks are gathered one by one; what calls a model of timm, under DDP.
MACHINES = {
    "layers": ZERO_3,
    "relations": FSDP_2,
    "logits": ZERO_3,
    "token": DDP,
    "register": FSDP_2,
}
IN_CLASSES = ("logits", "token", "register")
TWO = f"students=[{{name: small, model: {STUDENT}}}, {{name: wide.1, model: {STUDENT.replace('width: 16', 'width: 32')}}}]"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    plain = encoder_export(folder / "plain")
    head = encoder_export(folder / "head", pooling="avg", classes=DIGITS)
    return {lesson: head if lesson in IN_CLASSES else plain for lesson in LESSONS}


def settings(lesson: str, teachers: dict[str, Path], student: str = f"model={STUDENT}") -> tuple[str, ...]:
    return (*SHORT, f"teacher={teachers[lesson]}", student, *LESSONS[lesson])


def curve(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """What was learned at each step, by name; not how fast."""
    kept = ("loss", "grad_norm", "_distance", "_divergence", "_loss", "agreement")
    return {name: [row[name] for row in rows if name in row] for name in rows[0] if name.endswith(kept)}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "lesson", [pytest.param(each, marks=THOROUGH if each in ("logits", "register") else ()) for each in MACHINES]
)
def test_one_curve_on_any_machine(
    lesson: str,
    teachers: dict[str, Path],
    configs: dict[str, Path],
    one_rank: Ranks,
    two_ranks: Ranks,
    tmp_path: Path,
) -> None:
    stage, told = stage_named("distill"), settings(lesson, teachers)
    alone = curve(one_rank.train(stage, configs["distill"], tmp_path / "alone", *told, PLAIN))
    assert len(alone["loss"]) == 3
    assert alone["loss"][-1] < alone["loss"][0]
    found = curve(two_ranks.train(stage, configs["distill"], tmp_path / "run", *told, *MACHINES[lesson]))
    assert found.keys() == alone.keys()
    for each, values in alone.items():
        assert found[each] == pytest.approx(values, rel=1e-4 if each == "grad_norm" else 2e-5), each
    card = json.loads((tmp_path / "run" / "export" / "card.json").read_text())
    assert card["classes"] == (list(DIGITS) if lesson in IN_CLASSES else [])
    ours, theirs = (weights(tmp_path / each / "export") for each in ("run", "alone"))
    assert ours.keys() == theirs.keys()


@pytest.mark.thorough
def test_bf16_is_one_curve_where_differences_are_small(
    teachers: dict[str, Path], configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    """Engines differ in how far their autocast reaches; a divergence is made of differences, and cannot be negative."""
    stage, told = (
        stage_named("distill"),
        (*settings("relations", teachers), "engine.precision=bf16", "batch.max_micro_size=64"),
    )
    plain = curve(one_rank.train(stage, configs["distill"], tmp_path / "plain", *told, PLAIN))
    zero = curve(one_rank.train(stage, configs["distill"], tmp_path / "zero", *told, "engine.zero=1"))
    assert zero["vv_divergence"] == pytest.approx(plain["vv_divergence"], rel=1e-3)
    assert zero["qk_divergence"] == pytest.approx(plain["qk_divergence"], rel=1e-3)
    assert min(plain["vv_divergence"]) > 0


def test_students_together_are_the_students_alone(
    teachers: dict[str, Path], configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    """Bit for bit, in weights and in numbers: they share nothing but the teacher's lesson."""
    stage, free = stage_named("distill"), (PLAIN, "optim.max_grad_norm=null")
    for lesson in ("features", "layers"):
        told = settings(lesson, teachers, TWO)
        rows = one_rank.train(stage, configs["distill"], tmp_path / lesson, *told, *free, "model=null")
        for name, width in (("small", 16), ("wide.1", 32)):
            told = settings(lesson, teachers, f"model={STUDENT.replace('width: 16', f'width: {width}')}")
            alone = one_rank.train(stage, configs["distill"], tmp_path / f"{lesson} {name}", *told, *free)
            own = curve(alone)
            assert {each: curve(rows)[f"{name}/{each}"] for each in own if each != "grad_norm"} | {
                "grad_norm": own["grad_norm"]
            } == own
            ours, theirs = (
                weights(tmp_path / lesson / "export" / name),
                weights(tmp_path / f"{lesson} {name}" / "export"),
            )
            assert ours.keys() == theirs.keys()
            assert all(ours[each].equal(theirs[each]) for each in ours)
        assert sorted(each.name for each in (tmp_path / lesson / "export").iterdir()) == ["small", "wide.1"]


@pytest.mark.thorough
def test_stopping_changes_nothing_for_several(
    teachers: dict[str, Path], configs: dict[str, Path], two_ranks: Ranks, tmp_path: Path
) -> None:
    """Nor the averages of BatchNorm that one of them has; and what is exported can teach."""
    net = f"students=[{{name: small, model: {STUDENT}}}, {{name: net, backbone: test_resnet}}]"
    told = (
        *settings("features", teachers, net),
        "model=null",
        "optim.max_grad_norm=null",
        "patch_weight=0",
        "engine.zero=2",
    )
    stage, whole, parts = stage_named("distill"), tmp_path / "whole", tmp_path / "parts"
    rows = two_ranks.train(stage, configs["distill"], whole, *told)
    two_ranks.train(stage, configs["distill"], parts, *told, "run.stop_at_step=2")
    assert curve(two_ranks.train(stage, configs["distill"], parts, *told)) == curve(rows)
    for name, width in (("small", 16), ("net", 96)):
        ours, theirs = (weights(run / "export" / name) for run in (parts, whole))
        assert all(ours[each].equal(theirs[each]) for each in theirs)
        folder, asked = parts / "export" / name, TeacherTarget("features", patches=False)
        (feature,) = Teacher(*read_export(folder), asked, torch.device("cpu"), "fp32")(torch.rand(2, 1, 16, 16))
        assert feature.shape == (2, width)


@pytest.mark.thorough
def test_what_the_teacher_has_said_is_not_asked_again(
    teachers: dict[str, Path], configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    """Bit for bit the same, also where rows are lost; and what is kept is what is learned from."""
    stage, folder = stage_named("distill"), tmp_path / "lessons"
    told = (*settings("layers", teachers), PLAIN, "epochs=2")
    kept = (*told, f"teacher_cache.dir={folder}")
    alone = curve(one_rank.train(stage, configs["distill"], tmp_path / "alone", *told))
    assert curve(one_rank.train(stage, configs["distill"], tmp_path / "first", *kept)) == alone
    (key,) = folder.iterdir()
    assert (key / "rows").stat().st_blocks * 512 >= 6 * 64 * 2 * 5 * 32 * 4  # six batches of two blocks' tokens
    rows = (key / "rows").read_bytes()
    one_rank.train(stage, configs["distill"], tmp_path / "second", *kept, "model.width=32")
    assert (key / "rows").read_bytes() == rows
    (key / "rows").write_bytes(rows[: len(rows) // 2] + bytes(len(rows) - len(rows) // 2))
    assert curve(one_rank.train(stage, configs["distill"], tmp_path / "third", *kept)) == alone
    assert (key / "rows").read_bytes() == rows
    told = json.loads((key / "facts.json").read_text())["facts"]
    forged = TeacherCache(folder, told, len(rows) // (2 * 5 * 32 * 4 + 8), [TensorSpec((5, 32), torch.float32)] * 2)
    forged.put(torch.arange(forged.num_rows), [torch.ones(forged.num_rows, 5, 32)] * 2)
    assert curve(one_rank.train(stage, configs["distill"], tmp_path / "fourth", *kept))["loss"] != alone["loss"]
    with pytest.raises(ConfigError, match=r"teacher_cache.max_gigabytes=1e-05, but the teacher's outputs for .* views"):
        one_rank.train(stage, configs["distill"], tmp_path / "fifth", *kept, "teacher_cache.max_gigabytes=1e-5")


@pytest.mark.thorough
def test_weights_of_others_teach(configs: dict[str, Path], one_rank: Ranks, tmp_path: Path) -> None:
    """A network of timm with a head, whose classes have no names: the data's are taken."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    told = (*SHORT, f"teacher={tmp_path}", "teacher_name=resnet10t", "data.mean=[0.4]", "data.std=[0.3]")
    told += ("method=logits", "label_weight=0", f"model={STUDENT}", PLAIN)
    found = curve(one_rank.train(stage_named("distill"), configs["distill"], tmp_path / "run", *told))
    assert found["loss"][-1] < found["loss"][0]
    card = json.loads((tmp_path / "run" / "export" / "card.json").read_text())
    assert (card["classes"], card["mean"]) == (list(DIGITS), [0.4])
    eleven = timm.create_model("resnet10t", in_chans=1, num_classes=11)
    save_file(eleven.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has 11 classes, .* has 10; they must be equal"):
        one_rank.train(stage_named("distill"), configs["distill"], tmp_path / "eleven", *told)
