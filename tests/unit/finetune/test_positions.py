"""Sine-cosine positions in fine-tuning: trained as MAE's code does, fixed in runs before 0.2, carried by the export."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks, stage_named
from timm.layers.pos_embed import resample_abs_pos_embed

from finetune.config import FinetuneConfig
from finetune.model import classifier_from_plan, encoder_for_dense_head, param_groups_from_plan
from finetune.plan import plan_training
from finetune.task import FinetunePlan
from foveal.errors import ExportError
from foveal.models.config import VitConfig
from foveal.models.sincos import sincos_positions
from foveal.models.vit import build_encoder, encoder_card, resolve_sizes
from foveal.weights.export import Card, read_export, write_export
from foveal.weights.teacher import build_unfrozen_teacher
from pretrain.init import inspect_init_weights

TINY: dict[str, Any] = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 16, "depth": 2, "heads": 2}
FORMULA = sincos_positions(4, 4, 16)


def tree(digits: Path, **overrides: Any) -> dict[str, Any]:
    data = {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 4, "samples_per_class": 26}
    settings: dict[str, Any] = {
        "epochs": 1,
        "data": data | overrides.pop("data", {}),
        "batch": {"global_size": 52, "max_micro_size": 52},
        "optim": {"layer_decay": 0.5, "lr_per_256": 0.05},
        "engine": {"kind": "plain"},
        "run": {"dir": "runs/x"},
    }
    return settings | ({} if "init" in overrides or "backbone" in overrides else {"model": TINY}) | overrides


def plan_of(digits: Path, **overrides: Any) -> FinetunePlan:
    return plan_training(FinetuneConfig.from_dict(tree(digits, **overrides), "here"), 1)


def pretrained(folder: Path, image_size: int = 16, **sizes: Any) -> Path:
    torch.manual_seed(0)
    vit = VitConfig(**TINY | sizes)
    encoder = build_encoder(vit, image_size=image_size, channels=1)
    write_export(folder, encoder.state_dict(), Card("pretrain", encoder_card(vit, image_size, 1), (0.3,), (0.4,)))
    return folder


@pytest.mark.parametrize("from_export", [False, True])
def test_positions_are_trained_as_maes_code_does(from_export: bool, digits: Path, tmp_path: Path) -> None:
    """models_vit.py has them as a parameter, which lr_decay.py puts into layer 0 without weight decay."""
    plan = plan_of(digits, **({"init": str(pretrained(tmp_path / "export"))} if from_export else {}))
    model = classifier_from_plan(plan)
    positions = model.encoder.get_parameter("pos_embed")
    assert positions[0, 1:].equal(FORMULA)
    assert not positions[0, 0].any()
    (group,) = [
        group
        for group in param_groups_from_plan(plan, model)
        if any(parameter is positions for parameter in group["params"])
    ]
    assert (group["lr_scale"], group["weight_decay"]) == (0.5**3, 0.0)
    assert plan.encoder["positions"] == "sincos"
    assert plan.exported_encoder["positions"] == "learned"


@pytest.mark.parametrize(
    ("settings", "is_trained", "exported"),
    [
        ({"train_sincos_positions": False}, False, "sincos"),
        ({"freeze_encoder": True}, False, "sincos"),
        ({"model": TINY | {"positions": "learned"}}, True, "learned"),
        ({"model": TINY | {"positions": "learned"}, "train_sincos_positions": False}, True, "learned"),
        ({"model": TINY | {"positions": "learned"}, "freeze_encoder": True}, False, "learned"),
        ({"ema_decay": 0.9}, True, "learned"),
        ({"model": TINY | {"name": "vit_relpos_base_patch16_cls_224", "positions": None}}, None, None),
        ({"model": TINY | {"name": "vit_base_patch16_rope_224", "positions": None}}, None, None),
        ({"backbone": "test_vit", "data": {"image_size": 32}}, True, None),
    ],
)
def test_other_positions_are_as_they_were(
    settings: dict[str, Any], is_trained: bool | None, exported: str | None, digits: Path
) -> None:
    plan = plan_of(digits, **settings)
    model = classifier_from_plan(plan)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert trained.get("encoder.pos_embed") == is_trained
    assert not trained.get("averaged.pos_embed")
    assert plan.exported_encoder.get("positions") == exported


def test_a_frozen_encoder_of_a_dense_head_has_fixed_positions(digits: Path) -> None:
    frozen, trained = (encoder_for_dense_head(plan_of(digits, freeze_encoder=value)) for value in (True, False))
    assert not frozen.get_parameter("pos_embed").requires_grad
    assert trained.get_parameter("pos_embed").requires_grad


def train(digits: Path, ranks: Ranks, folder: Path, *overrides: str, **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree(digits, **settings)))
    ranks.train(stage_named("finetune"), folder / "config.yaml", folder / "run", *overrides)


def test_an_export_carries_trained_positions_into_every_next_stage(
    digits: Path, one_rank: Ranks, tmp_path: Path
) -> None:
    train(digits, one_rank, tmp_path / "first", init=str(pretrained(tmp_path / "export")))
    export = tmp_path / "first" / "run" / "export"
    weights, card = read_export(export)
    table = weights["pos_embed"]
    assert card.encoder["positions"] == "learned"
    assert (table[0, 1:] - FORMULA).abs().max() > 1e-3
    assert table[0, 0].any(), "the row of the class token is trained too"
    rebuilt = build_unfrozen_teacher(weights, card, None, export)
    assert rebuilt.get_parameter("pos_embed").equal(table)
    next_run = classifier_from_plan(plan_of(digits, init=str(export)))
    assert next_run.encoder.get_parameter("pos_embed").equal(table)
    larger = classifier_from_plan(plan_of(digits, init=str(export), data={"image_size": 24}))
    expected = resample_abs_pos_embed(table, [6, 6], [4, 4], 1)
    torch.testing.assert_close(larger.encoder.get_parameter("pos_embed"), expected)
    assert (expected[0, 1:] - sincos_positions(6, 6, 16)).abs().max() > 0.1
    cfg = FinetuneConfig.from_dict(tree(digits), "here")
    with pytest.raises(ExportError, match="positions"):
        inspect_init_weights(export, resolve_sizes(VitConfig(**TINY)), cfg.data)
    source = inspect_init_weights(export, resolve_sizes(VitConfig(**TINY, positions="learned")), cfg.data)
    assert "pos_embed" in source.loaded_keys


def test_a_fixed_run_exports_the_formula_and_a_stopped_run_has_the_weights_of_a_whole_one(
    digits: Path, one_rank: Ranks, tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in ("fixed", "whole", "parts")}
    train(digits, one_rank, folders["fixed"], train_sincos_positions=False)
    train(digits, one_rank, folders["whole"], epochs=2, ema_decay=0.5)
    train(digits, one_rank, folders["parts"], "run.stop_at_step=3", epochs=2, ema_decay=0.5)
    train(digits, one_rank, folders["parts"], epochs=2, ema_decay=0.5)
    (fixed, fixed_card), (whole, card), (parts, _) = (
        read_export(folder / "run" / "export") for folder in folders.values()
    )
    assert fixed_card.encoder["positions"] == "sincos"
    assert fixed["pos_embed"][0, 1:].equal(FORMULA)
    assert card.encoder["positions"] == "learned"
    assert not whole["pos_embed"][0, 1:].equal(FORMULA), "the average follows trained positions"
    assert all(parts[name].equal(value) for name, value in whole.items())
