"""Every kind of encoder through the three stages: on images that are not square, and one curve on any machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, stage_named

_SIZE = "data.image_size=[16, 24]"
ENCODERS = {
    "relative": "model={name: vit_relpos_medium_patch16_cls_224, patch: 4, width: 32, depth: 2, heads: 2, positions: null}",
    "rotary": "model={name: vit_base_patch16_rope_mixed_224, patch: 4, width: 32, depth: 2, heads: 2, positions: null}",
    "both": "model={name: eva02_tiny_patch14_224, patch: 4, width: 32, depth: 2, heads: 2}",
}
MASKINGS = {"relative": "random", "rotary": "grid", "both": "block"}


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def card_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "export" / "card.json").read_text())


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=() if each == "both" else pytest.mark.thorough) for each in ENCODERS]
)
def test_a_kind_of_encoder_goes_through_all_stages(
    kind: str, configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    shared = (_SIZE, "data.samples_per_class=20", "epochs=2")  # six steps
    pretraining = (ENCODERS[kind], f"mask_strategy={MASKINGS[kind]}", "mask_block_size=2", *shared)
    stage, config = stage_named("pretrain"), configs["pretrain"]
    alone = one_rank.train(stage, config, tmp_path / "alone", *pretraining, "engine.kind=plain")
    zero3 = two_ranks.train(stage, config, tmp_path / "zero3", *pretraining, "engine.zero=3", "batch.max_micro_size=16")
    assert losses(zero3) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(alone)[-1] < losses(alone)[0]

    teacher = tmp_path / "alone" / "export"
    assert card_of(tmp_path / "alone")["encoder"]["image_size"] == [16, 24]
    for name, size, overrides in (
        ("pretrain", 24, (f"init={teacher}", ENCODERS[kind], "engine.kind=plain")),
        ("distill", [16, 24], (f"teacher={teacher}", ENCODERS["both"], "engine.kind=plain")),
        ("finetune", 24, (f"init={teacher}", "engine.kind=accelerate", "engine.sharding=fsdp2")),
    ):
        ranks = two_ranks if name == "finetune" else one_rank
        rows = ranks.train(
            stage_named(name), configs[name], tmp_path / name, *shared, *overrides, f"data.image_size={size}"
        )
        assert all(0 < loss < 10 for loss in losses(rows))
        card = card_of(tmp_path / name)
        assert (card["encoder"]["image_size"], card["resized_from"]) == (size, [16, 24] if size != [16, 24] else None)
