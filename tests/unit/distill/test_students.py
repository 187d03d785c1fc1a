"""Compatibility of teacher and students: every error message of the plan, and the plan of compatible pairs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from teachers import DIGITS, DISTILLED, TEACHER, backbone_export, config, encoder_export

from distill.plan import plan_distillation
from distill.students import build_students
from distill.train import build
from foveal.data.dataset import Dataset
from foveal.errors import ConfigError, FovealError
from foveal.forecast.trace import _fake_batch, count_parameters, count_sample_flops, trace_microbatch_memory
from foveal.models.config import VitConfig

TINY = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 16, "depth": 3, "heads": 4}
EVA = VitConfig(name="eva02_tiny_patch14_224", patch=4, width=32, depth=2, heads=2)
SPLIT = VitConfig(name="eva02_base_patch14_224", patch=4, width=32, depth=2, heads=2)
Y = {"name": "y", "model": TINY}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "plain": encoder_export(folder / "plain"),
        "head": encoder_export(folder / "head", pooling="avg", classes=DIGITS),
        "nine": encoder_export(folder / "nine", classes=DIGITS[:9]),
        "other": encoder_export(folder / "other", classes=("0", "1", "two", *DIGITS[3:])),
        "split": encoder_export(folder / "split", SPLIT),
        "resnet": backbone_export(folder / "resnet", "test_resnet", classes=DIGITS, image_size=16),
        "fixed": backbone_export(folder / "fixed", "deit_tiny_patch16_224", image_size=32),
    }


SENTENCES: list[tuple[str, dict[str, Any], str]] = [
    ("plain", {"backbone": "test_resnet"}, "model and backbone exclude each other: keep one of them"),
    (
        "plain",
        {"model": None, "students": [Y, Y]},
        "two students have the name y: each needs its own folder in export/",
    ),
    (
        "plain",
        {"model": None, "students": [{"name": "y"}]},
        "students.0.model is missing: give it, or students.0.backbone",
    ),
    (
        "plain",
        {"model": None, "students": [Y | {"backbone": "test_resnet"}]},
        "students.0.model and students.0.backbone exclude each other: keep one of them",
    ),
    *(
        (
            "plain",
            {"model": None, "students": [Y | {"name": name}]},
            f"students.0.name={name!r} is no plain name of a folder",
        )
        for name in ("", "..", "a/b", "ä", "a b")
    ),
    ("plain", {"method": "layers", "layers": [[1, 1], [2, 1], [1, 1]]}, "layers has the pair [1, 1] twice"),
    *(
        (
            "plain",
            {"method": lesson, "layers": [[1, 1], pair]},
            f"layers has the pair {pair}, but the teacher has blocks 1 to 4 and model has 1 to 3",
        )
        for lesson, pair in (("layers", [5, 1]), ("relations", [1, 4]), ("layers", [0, 1]), ("relations", [1, 0]))
    ),
    (
        "plain",
        {"method": "layers", "model": None, "students": [{"name": "deep.1", "model": TINY}], "layers": [[4, 4]]},
        "the teacher has blocks 1 to 4 and students.deep.1.model has 1 to 3",
    ),
    (
        "plain",
        {"method": "relations", "model": None, "students": [Y, {"name": "deep", "model": TINY | {"depth": 4}}]},
        "layers is empty, and students of depths 3, 4 would need two blocks of the teacher: its last, 4, for those",
    ),
    ("plain", {"method": "layers", "mask_ratio": 0.99}, "mask ratio 0.99 leaves none of 16 patches visible"),
    ("plain", {"method": "relations", "model": TINY | {"patch": 8}}, "has patch 4, the student's model.patch is 8"),
    (
        "plain",
        {"method": "relations", "model": TINY | {"width": 15, "heads": 3, "positions": "learned"}},
        "model.width=15 is not divisible by the teacher's 2 heads, in which relations are compared; 16 is",
    ),
    (
        "plain",
        {"method": "relations", "model": EVA.to_dict()},
        "model.name='eva02_tiny_patch14_224' does not support method=relations: its attention adds biases to what its layer makes",
    ),
    (
        "split",
        {"method": "relations"},
        "'eva02_base_patch14_224', does not support method=relations: its queries, keys and values have a layer each",
    ),
    *(
        (
            "plain",
            {"method": lesson, "model": None, "backbone": "test_resnet"},
            f"method={lesson} reads the blocks of a foveal encoder, and backbone=test_resnet is a timm backbone",
        )
        for lesson in ("layers", "relations")
    ),
    ("resnet", {"method": "layers"}, "is the timm backbone test_resnet, and method=layers reads the blocks"),
    ("plain", {"method": "logits"}, "has no classification head, and method=logits needs one"),
    ("resnet", {"data": {"channels": 3}}, "has channels 1, the student's data.channels is 3; they must be equal"),
    (
        "plain",
        {"model": None, "backbone": "test_resnet"},
        "has 4 x 4 patch features, backbone=test_resnet has 1 x 1; patch_weight=0 compares pooled features only",
    ),
    ("resnet", {}, "has 1 x 1 patch features, model has 4 x 4; patch_weight=0 compares pooled features only"),
    ("head", {}, "was fine-tuned with pooling=avg and has no norm after its tokens"),
    ("plain", {"model": None, "backbone": "resnet10"}, "'resnet10' is not a model of timm"),
    (
        "fixed",
        {"patch_weight": 0.0},
        "fixed is a deit_tiny_patch16_224 of images of 32 x 32 pixels and has weights of that",
    ),
    ("plain", {"model": None, "backbone": "test_maxvit"}, "'test_maxvit' "),
    (
        "plain",
        {"model": None, "students": [Y | {"name": "card.json"}]},
        "a student cannot have the name card.json, which is a file of an export",
    ),
    (
        "plain",
        {
            "model": None,
            "backbone": "test_resnet",
            "patch_weight": 0.0,
            "batch": {"global_size": 64, "max_micro_size": 1},
        },
        "the student has BatchNorm, which cannot train on microbatches of 1 image; use a larger batch.max_micro_size",
    ),
    ("nine", {"method": "logits"}, "has 9 classes, "),
    ("other", {"method": "logits"}, "class 2 is 'two' for the teacher "),
    (
        "head",
        {"method": "token"},
        "method=token trains a distillation token, and model has none; set model.registers=1, or a backbone such as",
    ),
    (
        "head",
        {"method": "token", "model": None, "backbone": "deit_tiny_patch16_224"},
        "method=token trains a distillation token, and backbone=deit_tiny_patch16_224 has none",
    ),
    (
        "plain",
        {"model": None, "backbone": "selecsls42", "patch_weight": 0.0, "engine": {"activation_checkpointing": True}},
        "timm cannot recompute the activations of 'selecsls42': set engine.activation_checkpointing=false",
    ),
]


@pytest.mark.parametrize(("teacher", "settings", "sentence"), SENTENCES)
def test_what_cannot_be_is_one_sentence(
    teacher: str, settings: dict[str, Any], sentence: str, digits: Path, teachers: dict[str, Path]
) -> None:
    with pytest.raises(FovealError) as caught:
        plan_distillation(config(digits, teachers[teacher], **({"model": TINY} | settings)), 1)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lesson", "model", "pairs"),
    [
        ("layers", TINY, ((3,), (2,))),
        ("relations", TINY, ((3,), (3,))),
        ("relations", TINY | {"depth": 4}, ((4,), (4,))),
    ],
)
def test_layers_that_are_not_named(
    lesson: str, model: dict[str, Any], pairs: Any, digits: Path, teachers: dict[str, Path]
) -> None:
    distill_plan = plan_distillation(config(digits, teachers["plain"], method=lesson, model=model), 1)
    assert (distill_plan.target.blocks, distill_plan.student_specs[0].block_numbers) == pairs
    assert f"method    {lesson} of {teachers['plain']}, blocks {pairs[0][0]}" in distill_plan.summary_lines()


def test_a_run_in_flight_keeps_the_layers_of_its_version(digits: Path, teachers: dict[str, Path]) -> None:
    """Relations of a teacher as deep as the student were those of its block at 3/4 of the depth."""
    cfg = config(digits, teachers["plain"], method="relations", model=TINY | {"depth": 4})
    saved = {"method": "relations", "layers": [], "distance": "cosine"}
    distill_plan = plan_distillation(cfg.keep_neutral_values(saved), 1)
    assert (distill_plan.target.blocks, distill_plan.student_specs[0].block_numbers) == ((3,), (4,))


def test_one_setting_is_the_published_loss_of_layers(digits: Path, teachers: dict[str, Path]) -> None:
    dmae = config(digits, teachers["plain"], method="layers", layer_loss="dmae")
    assert (dmae.distance, dmae.norm_pix, dmae.pixel_weight) == ("unit_l1", False, 1.0)
    assert type(dmae).from_dict(dmae.to_dict(), "config.yaml") == dmae
    default = config(digits, teachers["plain"], method="layers")
    assert (default.distance, default.norm_pix, default.layer_loss) == ("cosine", True, "mean")
    with pytest.raises(ConfigError, match=r"layer_loss=dmae requires distance=unit_l1 \(given: distance=cosine\)"):
        config(digits, teachers["plain"], method="layers", layer_loss="dmae", distance="cosine")


def test_labels_that_are_not_there(digits: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Data without classes, or without any label, is refused, except with soft labels only."""
    monkeypatch.setattr(Dataset, "labels", lambda *_: torch.tensor([-1, -1]).numpy())
    with pytest.raises(FovealError, match=r"label_weight=0\.5, but no sample of split 'train' of .* has a label"):
        plan_distillation(config(digits, teachers["head"], method="logits", model=TINY), 1)
    monkeypatch.setattr(Dataset, "labels", lambda *_: torch.tensor([-1, 10]).numpy())
    with pytest.raises(FovealError, match="split 'train' has label 10, but there are 10 classes"):
        plan_distillation(config(digits, teachers["head"], method="logits", model=TINY), 1)
    monkeypatch.setattr(Dataset, "classes", None)
    token = {"method": "token", "backbone": DISTILLED}
    for settings, alternative in (({"method": "logits", "model": TINY}, ", or set label_weight=0"), (token, "")):
        with pytest.raises(ConfigError, match=rf"have no classes; pack or index them with labels{alternative}$"):
            plan_distillation(config(digits, teachers["head"], **settings), 1)
    assert (
        plan_distillation(config(digits, teachers["head"], method="logits", label_weight=0.0, model=TINY), 1).classes
        == DIGITS
    )


@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        ("plain", {"backbone": "test_resnet", "patch_weight": 0.0}),
        ("resnet", {"backbone": "test_efficientnet", "cls_weight": 0.0}),
        ("plain", {"backbone": "resmlp_12_224", "patch_weight": 0.0}),  # without a feature map
        ("head", {"method": "token", "model": TINY | {"registers": 1}}),
        ("resnet", {"model": TINY | {"patch": 16}}),
        ("resnet", {"method": "logits", "model": TINY}),
        ("head", {"method": "logits", "backbone": "test_resnet"}),
        ("head", {"method": "layers", "model": TINY | {"registers": 2}, "pixel_weight": 0.0}),
        ("plain", {"method": "layers", "model": EVA.to_dict()}),
        ("head", {"method": "relations", "model": TINY | {"registers": 2}, "layers": [[1, 1], [4, 2]]}),
    ],
)
def test_every_parameter_learns(
    teacher: str, settings: dict[str, Any], digits: Path, teachers: dict[str, Path]
) -> None:
    """Every parameter has a gradient, if only zero: engines that shard weights or reduce gradients wait for all."""
    setup = build(plan_distillation(config(digits, teachers[teacher], **settings), 1), torch.device("cpu"))
    total, _ = setup.objective(setup.model.train(), _fake_batch(4, 1, (16, 16)))
    total.backward()
    trained = [(name, parameter) for name, parameter in setup.model.named_parameters() if parameter.requires_grad]
    assert not [name for name, parameter in trained if parameter.grad is None]
    assert total.isfinite()


@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        ("plain", {"method": "layers", "model": TINY}),
        ("plain", {"method": "relations", "model": TINY}),
        ("head", {"method": "logits", "model": TINY}),
        ("head", {"method": "token", "backbone": DISTILLED}),
        ("head", {"method": "token", "model": TINY | {"registers": 1}}),
    ],
)
@torch.no_grad()
def test_an_evaluation_has_the_loss_of_training(
    teacher: str, settings: dict[str, Any], digits: Path, teachers: dict[str, Path]
) -> None:
    """timm's distilled model returns one tensor in evaluation, the mean of two. Features are of the student's width."""
    setup = build(plan_distillation(config(digits, teachers[teacher], **settings), 1), torch.device("cpu"))
    batch = _fake_batch(4, 1, (16, 16))
    trained, _ = setup.objective(setup.model.train(), batch)
    assert setup.objective(setup.model.eval(), batch)[0].equal(trained)
    (features,) = setup.model(torch.rand(4, 1, 16, 16), features_only=True)
    assert features.shape == (4, setup.model.get_submodule("each.0.encoder").num_features)


def test_the_plan_says_whose_curve_is_its_own(digits: Path, teachers: dict[str, Path]) -> None:
    students = [{"name": "net", "backbone": "test_resnet"}, {"name": "vit", "model": TINY}]
    lines = plan_distillation(config(digits, teachers["plain"], students=students, patch_weight=0.0), 2).summary_lines()
    assert "student   net: test_resnet" in lines
    assert "student   vit: vit_tiny_patch16_224 of width 16 and depth 3" in lines
    (beware,) = [line for line in lines if line.startswith("beware")]
    assert beware.startswith("beware    net has BatchNorm")
    assert beware.endswith("results depend on world size and microbatch size (2 and 32)")


def test_tables_of_biases_are_not_decayed(digits: Path, teachers: dict[str, Path]) -> None:
    settings = {"backbone": "swin_tiny_patch4_window7_224", "method": "logits", "data": {"image_size": 32}}
    setup = build(plan_distillation(config(digits, teachers["head"], **settings), 1), torch.device("meta"))
    names = {id(parameter): name for name, parameter in setup.model.named_parameters()}
    decayed_groups = [group["params"] for group in setup.param_groups if group["weight_decay"]]
    decayed = {names[id(parameter)] for group in decayed_groups for parameter in group}
    assert any("qkv.weight" in name for name in decayed)
    assert not [name for name in decayed if "relative_position_bias_table" in name]


def test_a_model_without_a_name_is_a_small_one(digits: Path, teachers: dict[str, Path]) -> None:
    (student,) = plan_distillation(config(digits, teachers["plain"], model={"patch": 4, "depth": 2}), 1).student_specs
    assert (student.card["name"], student.card["width"], student.card["depth"]) == ("vit_small_patch16_224", 384, 2)


def test_students_are_drawn_from_the_seed_each(digits: Path, teachers: dict[str, Path]) -> None:
    students = [{"name": "a", "model": TINY}, {"name": "b", "model": TINY}]
    pair = build_students(plan_distillation(config(digits, teachers["plain"], students=students), 1))
    single = build_students(plan_distillation(config(digits, teachers["plain"], model=TINY), 1)).state_dict()
    for name, value in pair.state_dict().items():
        assert value.equal(single[name.replace("each.1.", "each.0.")])


def test_a_plan_without_a_student_has_a_small_one(digits: Path, teachers: dict[str, Path]) -> None:
    encoder = TEACHER.to_dict() | {"patch": 16}
    settings = {"method": "logits", "data": {"image_size": 16}}
    (student,) = plan_distillation(config(digits, teachers["head"], **settings), 1).student_specs
    assert (student.name, student.card["name"], student.card["width"]) == ("", "vit_small_patch16_224", 384)
    assert encoder["patch"] == student.card["patch"]


@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        ("plain", {"method": "layers", "decoder": {"width": 16, "depth": 2, "heads": 2}}),
        ("plain", {"method": "relations"}),
        ("head", {"method": "logits"}),
        ("head", {"method": "token", "model": None, "backbone": DISTILLED}),
        ("plain", {"patch_weight": 0.0, "model": None, "students": [Y, {"name": "net", "backbone": "test_resnet"}]}),
    ],
)
def test_a_step_can_be_forecast(
    teacher: str, settings: dict[str, Any], digits: Path, teachers: dict[str, Path]
) -> None:
    """On fake tensors, in bf16 and with recomputation, every trained parameter gets its gradient too."""
    plan = plan_distillation(config(digits, teachers[teacher], **({"model": TINY} | settings)), 1)
    build_setup = partial(build, plan)
    trained = count_parameters(build_setup, plan.cfg.optim).trainable
    trace = trace_microbatch_memory(build_setup, 4, 1, (16, 16), precision="bf16", recompute=True)
    assert max(trace.peak_by_gradient_bytes) == 4 * trained
    assert count_sample_flops(build_setup, 1, (16, 16)).forward_backward > 0
