"""What a batch teaches is the sum of what its parts teach: of every objective, in loss, numbers, weight and gradient.

Engines add these sums over micros and ranks whatever the objective is (test_any_machine.py), so that an objective for
which this holds has one curve on any machine.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import stage_named
from rectangles import pack_rectangles
from scenes import scene_tree, write_scenes
from teachers import DIGITS, LESSONS, MEAN, STD, STUDENT, encoder_export

from foveal.data.batch import Batch
from foveal.data.loader import train_batches
from foveal.training.loop import TrainingSetup

WHOLE, PARTS = 64, (64, 16, 2)  # images of a step, and of a micro
DEVICE = torch.device("cpu")
PRETRAINING = {
    "pixels": ("norm_pix=true",),
    "blocks": ("mask_strategy=block", "mask_block_size=2"),
    "latents": ("target=features",),
    "latents and image": ("target=features", "image_loss_weight=0.5", "model.registers=2"),
    "image, own": ("image_loss_weight=0.5", "image_target=online"),
}
IN_CLASSES = ("logits", "token", "register")
FINETUNING = {
    "classes": (),
    "everything that draws": (
        *("mixup=0.8", "cutmix=1.0", "random_erasing=0.5", "dropout=0.2", "data.augment.rand_augment.ops=2"),
        *("class_weights=[1, 2, 1, 1, 1, 1, 1, 1, 0.5, 1]", "adversarial={epsilon: 8, step_size: 3, steps: 2}"),
        "teacher={init: CLASSIFIER, weight: 0.3}",
    ),
    "a token": (
        *("pooling=token", "model={name: vit_tiny_patch16_224, patch: 4, registers: 1, width: 16, depth: 2, heads: 2}"),
        "teacher={init: CLASSIFIER, weight: 0.3, kind: token}",
    ),
    "a frozen encoder": ("init=CLASSIFIER", "model=null", "freeze_encoder=true", "drop_path=0"),
}
SEGMENTATION = {"linear": {"head": "linear"}, "pyramid": {"head": "pyramid", "width": 16}}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "plain": encoder_export(folder / "plain"),
        "classes": encoder_export(folder / "head", pooling="avg", classes=DIGITS),
    }


@pytest.fixture(scope="module")
def trees(digits: Path, teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of each stage that the cases add to, none of them trained."""
    folder = tmp_path_factory.mktemp("sets")
    pack_rectangles(folder / "boxes", train=WHOLE)
    data = {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 8, "mean": list(MEAN), "std": list(STD)}
    vit = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 32, "depth": 2, "heads": 2}
    shared = {
        "seed": 3,
        "epochs": 1,
        "batch": {"global_size": WHOLE},
        "engine": {"kind": "plain"},
        "optim": {"max_grad_norm": None},
    }
    boxes = {"path": str(folder / "boxes"), "image_size": 32, "channels": 1, "lanes": 4}
    scenes = write_scenes(folder / "scenes", train=WHOLE)
    return {
        "pretrain": shared | {"data": data, "model": vit, "decoder": {"width": 16, "depth": 1, "heads": 2}},
        "distill": shared | {"data": data, "teacher": str(teachers["plain"])},
        "finetune": shared | {"data": data, "model": vit, "init": None, "drop_path": 0.1, "label_smoothing": 0.1},
        "segment": scene_tree(scenes, segment={}, class_weights=[0.5, 2, 1], batch={"global_size": WHOLE}),
        "detect": shared
        | {
            "task": "detection",
            "data": boxes | {"augment": {"scale": [0.8, 1.0]}, "mean": [0.5], "std": [0.25]},
            "model": vit,
        }
        | {"detect": {"width": 32, "layers": 1, "strides": [4, 8, 16], "each_class": True}, "drop_path": 0.1},
    }


CASES = [
    *(("pretrain", name, words) for name, words in PRETRAINING.items()),
    *(("distill", name, (*words, f"teacher={name}")) for name, words in LESSONS.items()),
    *(("finetune", name, words) for name, words in FINETUNING.items()),
    *(("segment", name, (f"segment={kind}",)) for name, kind in SEGMENTATION.items()),
    ("detect", "boxes", ()),
]


def learned(parts: TrainingSetup[Any], batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The sums over a step: loss, numbers, weight, and the gradient of each parameter."""
    parts.model.zero_grad()
    found: dict[str, Any] = {}
    for batch in batches:
        total, numbers = parts.objective(parts.model, batch)
        total.backward()
        weight = torch.as_tensor(parts.objective.batch_weight(batch), dtype=torch.float64)
        for name, value in ({"loss": total, "weight": weight} | numbers).items():
            found[name] = found.get(name, 0.0) + value.detach().double()
    gradients = {f"gradient of {n}": p.grad.double() for n, p in parts.model.named_parameters() if p.grad is not None}
    return found | gradients


@pytest.mark.parametrize(("kind", "name", "words"), CASES, ids=[f"{kind}, {name}" for kind, name, _ in CASES])
def test_parts_add_up(
    kind: str, name: str, words: tuple[str, ...], trees: dict[str, Any], teachers: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(trees[kind]))
    stage = stage_named(kind if kind in ("pretrain", "distill") else "finetune")
    if kind == "distill":
        words = (*words[:-1], f"teacher={teachers['classes' if name in IN_CLASSES else 'plain']}")
        words = words if "model=null" in words else (f"model={STUDENT}", *words)
    words = tuple(word.replace("CLASSIFIER", str(teachers["classes"])) for word in words)
    sums = []
    for at_once in PARTS:
        cfg = stage.config_class.load(
            tmp_path / "it.yaml", [*words, f"batch.max_micro_size={at_once}", "run.dir=runs/x"]
        )
        plan = stage.functions.build_plan(cfg, 1)
        parts = stage.functions.build(plan, DEVICE)
        parts.model.train()
        with train_batches(
            plan.training_set,
            cfg.data,
            rank=0,
            world_size=1,
            microbatch_size=at_once,
            start_step=0,
            stop_step=1,
            label_reader=plan.label_reader,
            mean=plan.mean,
        ) as batches:
            micros = list(batches)
        assert len(micros) == WHOLE // at_once
        sums.append(learned(parts, micros))
    whole = sums[0]
    # A bias before a norm has a gradient of rounding alone: what is small is measured by what is large.
    steepest = max(value.abs().max().item() for each, value in whole.items() if each.startswith("gradient"))
    for other in sums[1:]:
        assert other.keys() == whole.keys()
        for each, value in whole.items():
            nothing = 1e-6 * steepest if each.startswith("gradient") else 1e-9
            torch.testing.assert_close(other[each], value, rtol=1e-4, atol=nothing, msg=each)
