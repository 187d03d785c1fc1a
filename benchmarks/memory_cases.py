"""What benchmarks/memory.py trains."""

from dataclasses import dataclass, field
from typing import Any

_BUCKET = {"zero_optimization": {"reduce_bucket_size": 4_000_000}}
_SMALL_BUCKET = {"zero_optimization": {"reduce_bucket_size": 500_000, "stage3_param_persistence_threshold": 1000}}


@dataclass(frozen=True)
class Case:
    """What is trained, on images of ``side`` pixels. ``seen``: it was looked at while the model of memory was written."""

    name: str
    ranks: int
    engine: dict[str, Any]
    stage: str = "pretrain"
    change: dict[str, Any] = field(default_factory=dict)
    seen: bool = False
    side: int = 64


WIDE = {
    "model": {"name": "vit_tiny_patch16_224", "patch": 8, "width": 256, "depth": 4, "heads": 4},
    "decoder": {"width": 128, "depth": 3, "heads": 4},
}
DEEP = {"model": {"name": "vit_tiny_patch16_224", "patch": 16, "width": 160, "depth": 14, "heads": 5}}
LARGE = {"batch": {"global_size": 64, "max_micro_size": 32}}
EIGHT = {"batch": {"global_size": 32, "max_micro_size": 8}}
FEW = {"batch": {"global_size": 16, "max_micro_size": 4}}
PLAIN = {"kind": "plain"}
DEEPSPEED = {"kind": "deepspeed", "deepspeed": _BUCKET}
TIGHT = {"kind": "deepspeed", "deepspeed": _SMALL_BUCKET}
DERIVED = {"kind": "deepspeed"}  # of the model's size, as runs have them: foveal/engines/buckets.py
EMA = {"target": "features", "log": {"images_every": 0}}

ON_A_CPU = [
    Case("small, 4 micros", 1, PLAIN, seen=True),
    Case("small, 4 micros", 1, PLAIN | {"precision": "bf16"}, seen=True),
    Case("small, 2 micros", 2, {"kind": "deepspeed", "zero": 0}, seen=True),
    Case("small, 2 micros", 2, DEEPSPEED | {"zero": 1}, seen=True),
    Case("small, 2 micros", 2, DEEPSPEED | {"zero": 2}, seen=True),
    Case("small, 2 micros", 2, DEEPSPEED | {"zero": 3}, seen=True),
    Case("small, 2 micros", 2, DEEPSPEED | {"zero": 1, "precision": "bf16"}, seen=True),
    Case("wide, 1 micro of 64", 1, PLAIN, change=WIDE | {"batch": {"global_size": 64}}),
    Case(
        "wide, 16 micros of 4",
        1,
        PLAIN | {"precision": "bf16"},
        change=WIDE | {"batch": {"global_size": 64, "max_micro_size": 4}},
    ),
    Case("deep, 2 micros of 32", 1, PLAIN | {"activation_checkpointing": True}, change=DEEP | LARGE),
    Case(
        "deep, 2 micros of 32", 1, PLAIN | {"activation_checkpointing": True, "precision": "bf16"}, change=DEEP | LARGE
    ),
    Case("wide, 2 micros of 4", 2, {"kind": "deepspeed", "zero": 0}, change=WIDE | FEW),
    Case("wide, 1 micro of 32", 2, DEEPSPEED | {"zero": 1}, change=WIDE | LARGE),
    Case("wide, 2 micros of 4", 2, TIGHT | {"zero": 1, "precision": "bf16"}, change=WIDE | FEW),
    Case("wide, 1 micro of 32", 2, TIGHT | {"zero": 2}, change=WIDE | LARGE),
    Case("deep, 2 micros of 4", 2, DEEPSPEED | {"zero": 2, "precision": "bf16"}, change=DEEP | FEW),
    Case("wide, 1 micro of 32", 2, DEEPSPEED | {"zero": 3}, change=WIDE | LARGE),
    Case("deep, 2 micros of 4", 2, TIGHT | {"zero": 3, "activation_checkpointing": True}, change=DEEP | FEW, seen=True),
    Case("wide, 2 micros of 4", 2, TIGHT | {"zero": 3, "precision": "bf16"}, change=WIDE | FEW, seen=True),
    Case("wide, 2 micros of 8", 2, TIGHT | {"zero": 3, "activation_checkpointing": True}, change=WIDE | EIGHT),
    Case("deep, 2 micros of 8", 2, DEEPSPEED | {"zero": 3, "precision": "bf16"}, change=DEEP | EIGHT),
    Case(
        "small, 1 micro of 8",
        2,
        TIGHT | {"zero": 3, "precision": "bf16"},
        change={"batch": {"global_size": 16, "max_micro_size": 8}},
    ),
    Case("small, derived buckets", 2, DERIVED | {"zero": 1}, change=LARGE),
    Case("wide, derived buckets", 2, DERIVED | {"zero": 2, "precision": "bf16"}, change=WIDE | LARGE),
    Case("deep, derived buckets", 2, DERIVED | {"zero": 3}, change=DEEP | EIGHT),
    Case(
        "wide, derived buckets, sums in bf16",
        2,
        DERIVED | {"zero": 1, "precision": "bf16", "reduce_dtype": "autocast"},
        change=WIDE | FEW,
    ),
    Case("wide, EMA encoder", 2, DERIVED | {"zero": 1}, change=WIDE | LARGE | EMA),
    Case("wide, EMA encoder", 2, DERIVED | {"zero": 3}, change=WIDE | LARGE | EMA),
    Case("wide, EMA encoder", 2, {"kind": "accelerate", "sharding": "fsdp2"}, change=WIDE | LARGE | EMA),
    Case("distillation, wide", 2, DEEPSPEED | {"zero": 2}, "distill", WIDE | LARGE),
    Case("fine-tuning, wide", 1, PLAIN | {"precision": "bf16"}, "finetune", WIDE | LARGE),
    Case("fine-tuning, wide, DDP", 2, {"kind": "accelerate"}, "finetune", WIDE | LARGE),
    Case("fine-tuning, deep, FSDP2", 2, {"kind": "accelerate", "sharding": "fsdp2"}, "finetune", DEEP | LARGE),
]

BASE = {"model": {"name": "vit_base_patch16_224"}, "decoder": {}}
LARGE_VIT = {"model": {"name": "vit_large_patch16_224"}, "decoder": {}}


def _whole(at_once: int, micros: int = 1) -> dict[str, Any]:
    return {"batch": {"global_size": at_once * micros, "max_micro_size": at_once}}


# The paper's models at their real size, each alone on a card.
ON_A_GPU = [
    Case("ViT-B, 64 images", 1, PLAIN, change=BASE | _whole(64), side=224),
    Case("ViT-B, 256 images", 1, PLAIN | {"precision": "bf16"}, change=BASE | _whole(256), side=224),
    Case(
        "ViT-B, 128 images",
        1,
        {"kind": "deepspeed", "zero": 0, "precision": "bf16"},
        change=BASE | _whole(128),
        side=224,
    ),
    Case("ViT-B, 2 micros of 64", 1, {"kind": "deepspeed", "precision": "bf16"}, change=BASE | _whole(64, 2), side=224),
    Case(
        "ViT-L, 128 images",
        1,
        {"kind": "deepspeed", "zero": 2, "precision": "bf16", "activation_checkpointing": True},
        change=LARGE_VIT | _whole(128),
        side=224,
    ),
    Case(
        "ViT-L, 64 images",
        1,
        {"kind": "deepspeed", "zero": 3, "precision": "bf16"},
        change=LARGE_VIT | _whole(64),
        side=224,
    ),
    Case(
        "distillation of ViT-B", 1, {"kind": "deepspeed", "precision": "bf16"}, "distill", BASE | _whole(128), side=224
    ),
    Case(
        "fine-tuning, ViT-L, 32 images",
        1,
        {"kind": "accelerate", "precision": "bf16"},
        "finetune",
        LARGE_VIT | _whole(32),
        side=224,
    ),
    Case(
        "fine-tuning, ViT-L, 32 images",
        1,
        {"kind": "accelerate", "sharding": "fsdp2", "precision": "bf16"},
        "finetune",
        LARGE_VIT | _whole(32),
        side=224,
    ),
]
