"""The teacher stays frozen, its targets equal timm's activations, and unusable teachers are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teachers import DIGITS, backbone_export, encoder_export
from torch import Tensor, nn

from distill.config import DistillConfig
from distill.objective import DistillationLoss
from distill.plan import plan_distillation
from distill.target import TeacherTarget
from distill.teacher import Teacher
from foveal.data.batch import Batch
from foveal.engines.config import Precision
from foveal.errors import ConfigError, ExportError
from foveal.models.config import Pooling, VitConfig
from foveal.models.encode import encode_cls_and_patches
from foveal.models.students import FeatureStudent, Students
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, read_export, write_export

CPU = torch.device("cpu")
TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=16, depth=2, heads=2)
MEAN, STD = (0.3,), (0.4,)
FEATURES = TeacherTarget("features")


def export(folder: Path, *, pooling: Pooling = "token", classes: int = 0, **changes: Any) -> Path:
    """Write the export of an untrained encoder; ``changes`` of the card contradict the weights."""
    torch.manual_seed(0)
    encoder = build_encoder(TINY, image_size=16, channels=1, pooling=pooling, num_classes=classes)
    card = encoder_card(TINY, 16, 1, pooling=pooling, num_classes=classes) | changes
    write_export(folder, encoder.state_dict(), Card("pretrain", card, MEAN, STD))
    return folder


def load_teacher(
    folder: Path, precision: Precision = "fp32", image_size: Any = None, target: TeacherTarget = FEATURES
) -> Teacher:
    """The teacher of an export."""
    return Teacher(*read_export(folder), target, CPU, precision, image_size, folder)


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    return load_teacher(export(tmp_path / "export"))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_lesson_is_what_timm_makes_of_the_images(teacher: Teacher) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(TINY, image_size=16, channels=1).eval()
    with torch.no_grad():
        tokens = encoder.forward_features(images())
    cls, patches = teacher(images())
    assert (cls.shape, patches.shape) == ((3, 16), (3, 16, 16))
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 1:])


def test_no_gradient_reaches_a_teacher(teacher: Teacher) -> None:
    with torch.enable_grad():
        cls, patches = teacher(images().requires_grad_())
    assert not cls.requires_grad
    assert not patches.requires_grad
    assert not [name for name, parameter in teacher.model.named_parameters() if parameter.requires_grad]


def test_a_step_of_its_student_leaves_it_as_it_was(teacher: Teacher, tmp_path: Path) -> None:
    """The teacher stays in evaluation mode: no train() of a student, or of a parent of both, reaches it."""
    encoder = build_encoder(TINY, image_size=16, channels=1)
    student = Students([FeatureStudent(encoder, encode_cls_and_patches, (16, 16), (16, 16), with_patches=True)])
    student.teacher = teacher  # pyright: ignore[reportArgumentType]
    objective = DistillationLoss(teacher, distill(tmp_path, tmp_path), [""], MEAN, STD)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    outputs_before = teacher(images())
    pixels = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    ids = torch.arange(4)
    batch = Batch(pixels, torch.full((4,), -1), ids, ids, torch.ones(4, dtype=torch.bool), 0, 0, 0)
    for _ in range(2):
        student.train()
        total, _ = objective(student, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert not any(module.training for module in teacher.model.modules())
    assert not isinstance(teacher, nn.Module)
    assert not [name for name, _ in student.named_parameters() if "teacher" in name]
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert all(value.equal(exported[name]) for name, value in teacher.model.state_dict().items())
    for after, before in zip(teacher(images()), outputs_before, strict=True):
        assert after.equal(before)


def test_lower_precision_stays_inside(teacher: Teacher, tmp_path: Path) -> None:
    lowered = load_teacher(tmp_path / "export", "bf16")
    for low, full in zip(lowered(images()), teacher(images()), strict=True):
        assert low.dtype == full.dtype == torch.float32
        assert not low.equal(full)
        torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("card", "sentence"),
    [
        ({"depth": 3}, "export lacks blocks.2."),
        ({"depth": 1}, "export has names that are not the model's: blocks.1."),
        ({"width": 32}, "export has other shapes: cls_token"),
        ({"name": "vit_tiny_patch16_223"}, "card.json: 'vit_tiny_patch16_223' is not a model of timm"),
        ({"colour": "red"}, "card.json: colour is not a setting"),
    ],
)
def test_a_card_that_tells_of_another_encoder_is_one_sentence(
    card: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        load_teacher(export(tmp_path / "export", **card))
    assert sentence in str(caught.value)


def test_a_teacher_of_larger_images(tmp_path: Path) -> None:
    """Positions are resized to the grid of the images; sizes without a patch grid are refused."""
    folder = export(tmp_path / "export")
    torch.manual_seed(0)
    encoder = build_encoder(TINY, image_size=(16, 24), channels=1).eval()
    wide = torch.randn(2, 1, 16, 24)
    cls, patches = load_teacher(folder, image_size=(16, 24))(wide)
    tokens = encoder.forward_features(wide)
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 1:])
    with pytest.raises(ExportError, match=r"card.json: image_size=18 is not a whole number of patches of 4"):
        load_teacher(folder, image_size=18)


def test_a_plan_knows_what_is_resized(digits: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "export")
    assert plan_distillation(distill(digits, folder), 1).resized_from is None
    resized = plan_distillation(distill(digits, folder, data={"image_size": [16, 24]}), 1)
    assert resized.teacher_spec.resized_from == 16
    assert "teacher   trained on images of 16 x 16 pixels, used at 16 x 24" in resized.summary_lines()


def distill(digits: Path, teacher: Path, **settings: Any) -> DistillConfig:
    tree = {
        "epochs": 1,
        "teacher": str(teacher),
        "data": {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 8} | settings.get("data", {}),
        "model": TINY.to_dict() | {"width": 8} | settings.get("model", {}),
        "batch": {"global_size": 64},
        "optim": {},
        "run": {"dir": "runs/x"},
    }
    return DistillConfig.from_dict(tree, "here")


def test_a_student_inherits_its_teachers_pixels_and_digest(digits: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "export")
    first = plan_distillation(distill(digits, folder), 1)
    assert (first.mean, first.std) == (MEAN, STD)
    torch.manual_seed(5)
    encoder = build_encoder(TINY, image_size=16, channels=1)
    write_export(tmp_path / "other", encoder.state_dict(), Card("pretrain", encoder_card(TINY, 16, 1), MEAN, STD))
    moved = export(tmp_path / "elsewhere" / "export")
    assert plan_distillation(distill(digits, moved), 1).science_settings() == first.science_settings(), (
        "paths are not science"
    )
    changed = plan_distillation(distill(digits, tmp_path / "other"), 1).science_settings()
    assert {name for name in changed if changed[name] != first.science_settings()[name]} == {"inherited.teacher"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data": {"channels": 3}}, "has channels 1, the student's data.channels is 3; they must be equal"),
        ({"model": {"patch": 8}}, "has patch 4, the student's model.patch is 8; they must be equal"),
        (
            {"data": {"mean": [0.5], "std": [0.4]}},
            "data.mean is [0.5], the weights were trained with [0.3]; leave data.mean out (null)",
        ),
        (
            {"data": {"mean": [0.3], "std": [0.5]}},
            "data.std is [0.5], the weights were trained with [0.4]; leave data.std out (null)",
        ),
    ],
)
def test_a_student_that_cannot_follow_is_one_sentence(
    settings: dict[str, Any], sentence: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        plan_distillation(distill(digits, export(tmp_path / "export"), **settings), 1)
    assert str(caught.value).endswith(sentence)


def test_a_student_may_state_what_its_teacher_says(digits: Path, tmp_path: Path) -> None:
    stated = {"data": {"mean": list(MEAN), "std": list(STD)}}
    assert plan_distillation(distill(digits, export(tmp_path / "export"), **stated), 1).mean == MEAN


def test_no_teacher_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nobody is no export"):
        plan_distillation(distill(digits, tmp_path / "nobody"), 1)
    tree = distill(digits, tmp_path).to_dict()
    del tree["teacher"]
    with pytest.raises(ConfigError, match="teacher is missing"):
        DistillConfig.from_dict(tree, "here")


def test_a_classifier_that_reads_the_class_token_can_teach(digits: Path, tmp_path: Path) -> None:
    folder = export(tmp_path / "export", classes=10)
    assert plan_distillation(distill(digits, folder), 1).classes == ()
    assert load_teacher(folder)(images())[0].shape == (3, 16)


def test_a_classifier_that_reads_the_mean_of_the_patches_is_refused_in_the_plan(digits: Path, tmp_path: Path) -> None:
    """With pooling=avg the norm follows the mean, so that the tokens have no norm."""
    folder = export(tmp_path / "export", pooling="avg", classes=10)
    with pytest.raises(ExportError, match="pooling"):
        plan_distillation(distill(digits, folder), 1)


# Targets of each method


def capture_output(module: Any, images: Tensor, encoder: Any) -> Tensor:
    """The output of a module in timm's own forward."""
    outputs = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        encoder.forward_features(images)
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize(
    ("name", "registers", "positions"),
    [
        ("vit_tiny_patch16_224", 3, "sincos"),
        ("vit_base_patch16_rope_mixed_224", 0, None),
        ("vit_relpos_medium_patch16_cls_224", 0, None),
    ],
)
def test_layers_and_relations_are_what_timm_has_inside(
    name: str, registers: int, positions: Any, tmp_path: Path
) -> None:
    """With all patches visible: the outputs of blocks and of their qkv layers, without registers."""
    cfg = VitConfig(name=name, patch=4, width=32, depth=4, heads=2, registers=registers, positions=positions)
    folder = encoder_export(tmp_path / "export", cfg)
    encoder: Any = load_teacher(folder).model
    without_registers = [0, *range(registers + 1, registers + 17)]
    layers, relations = TeacherTarget("layers", (3, 1), 2, 4), TeacherTarget("relations", (3, 1), 2, 4)
    for target, module_of in ((layers, lambda block: block), (relations, lambda block: block.attn.qkv)):
        outputs = load_teacher(folder, target=target)(images())
        for output, number in zip(outputs, (3, 1), strict=True):
            expected = capture_output(module_of(encoder.blocks[number - 1]), images(), encoder)
            torch.testing.assert_close(output, expected[:, without_registers])


def test_the_lesson_of_visible_patches_is_of_them_alone(tmp_path: Path) -> None:
    teacher = load_teacher(encoder_export(tmp_path / "export"), target=TeacherTarget("layers", (2,), 2, 4))
    visible_indices = torch.tensor([[3, 1], [0, 15], [7, 8]])
    (tokens,) = teacher(images(), visible_indices)
    assert tokens.shape == (3, 3, 32)
    hidden = torch.ones(3, 16).scatter(1, visible_indices, 0.0).unflatten(1, (4, 4))
    noisy = images() + 9 * hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    assert teacher(noisy, visible_indices)[0].equal(tokens)


def test_a_row_of_a_lesson_is_a_function_of_its_image(tmp_path: Path) -> None:
    """A row does not depend on the other images of the batch, so that it can be cached."""
    folder = encoder_export(tmp_path / "export", pooling="avg", classes=DIGITS)
    resnet = backbone_export(tmp_path / "resnet", "test_resnet", classes=DIGITS, image_size=16)
    for teacher in (
        load_teacher(folder, target=TeacherTarget("relations", (1, 2), 2, 4)),
        load_teacher(folder, target=TeacherTarget("logits")),
        load_teacher(folder, target=TeacherTarget("token")),
        load_teacher(resnet, target=TeacherTarget("features")),
        load_teacher(resnet, target=TeacherTarget("token")),
    ):
        batch_outputs, image_outputs = teacher(images()), [teacher(image[None]) for image in images()]
        for output, rows in zip(batch_outputs, zip(*image_outputs, strict=True), strict=True):
            torch.testing.assert_close(output, torch.cat(rows))


@pytest.mark.parametrize(
    ("target", "blocks", "attentions"),
    [
        (TeacherTarget("features"), 4, 4),
        (TeacherTarget("layers", (2, 1), 2, 4), 2, 2),
        (TeacherTarget("relations", (3, 1), 2, 4), 2, 2),  # of the third block only norm1 and qkv run
    ],
)
def test_no_block_runs_beyond_what_is_asked(
    target: TeacherTarget, blocks: int, attentions: int, tmp_path: Path
) -> None:
    teacher = load_teacher(encoder_export(tmp_path / "export"), target=target)
    ran: list[str] = []
    for name, module in teacher.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    teacher(images())
    assert len([name for name in ran if name.count(".") == 1 and name.startswith("blocks.")]) == blocks
    assert len([name for name in ran if name.endswith(".attn")]) == attentions
    assert ("norm" in ran) == (target.kind == "features")


def test_a_teacher_cannot_be_put_into_training(tmp_path: Path) -> None:
    folder = backbone_export(tmp_path / "export", "test_resnet", image_size=16)
    teacher = load_teacher(folder)
    state_before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    outputs_before = teacher(images())
    teacher.model.train()
    for module in teacher.model.modules():
        module.train(True)
    nn.ModuleList([teacher.model]).train()
    assert not any(module.training for module in teacher.model.modules())
    assert all(after.equal(before) for after, before in zip(teacher(images()), outputs_before, strict=True))
    assert all(value.equal(state_before[name]) for name, value in teacher.model.state_dict().items()), (
        "BatchNorm's running statistics too"
    )
