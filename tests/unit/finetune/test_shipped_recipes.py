"""Shipped configs against the sources that they name: a value that changes must be the source's."""

from pathlib import Path

import pytest

from finetune.config import FinetuneConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "finetune"

# facebookresearch/mae: FINETUNE.md's command for ViT-B, and the defaults of main_finetune.py and of timm's transforms.
MAE_VIT_B = {
    "epochs": 100,
    "batch.global_size": 32 * 4 * 8,
    "optim.name": "adamw",
    "optim.schedule": "cosine",
    "optim.lr_per_256": 5e-4,
    "optim.min_lr": 1e-6,
    "optim.layer_decay": 0.65,
    "optim.weight_decay": 0.05,
    "optim.betas": [0.9, 0.999],
    "optim.warmup_epochs": 5,
    "optim.max_grad_norm": None,
    "drop_path": 0.1,
    "pooling": "avg",
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_switch_prob": 0.5,
    "random_erasing": 0.25,
    "random_erasing_boxes": "inside",
    "train_sincos_positions": True,
    "data.image_size": 224,
    "data.decode_version": 2,
    "data.augment.scale": [0.08, 1.0],
    "data.augment.ratio": [3 / 4, 4 / 3],
    "data.augment.hflip": 0.5,
    "data.augment.interpolation": "bicubic",
    "data.augment.rand_augment.ops": 2,
    "data.augment.rand_augment.magnitude": 9.0,
    "data.augment.rand_augment.magnitude_std": 0.5,
    "data.eval_crop_ratio": 224 / 256,
}
# github.com/IcarusWizard/MAE: the defaults of train_classifier.py.
CIFAR10_STUDY = {
    "epochs": 100,
    "batch.global_size": 128,
    "optim.name": "adamw",
    "optim.schedule": "cosine",
    "optim.lr_per_256": 1e-3,
    "optim.weight_decay": 0.05,
    "optim.betas": [0.9, 0.999],
    "optim.warmup_epochs": 5,
    "optim.max_grad_norm": None,
    "train_sincos_positions": True,
    "data.image_size": 32,
}


@pytest.mark.parametrize(("name", "source"), [("vit_b16", MAE_VIT_B), ("cifar10", CIFAR10_STUDY)])
def test_a_config_has_the_values_of_its_source(name: str, source: dict[str, object]) -> None:
    found = FinetuneConfig.load(CONFIGS / f"{name}.yaml").to_flat_dict()
    assert {setting: found[setting] for setting in source} == source


def test_the_peak_rate_and_the_steps_of_the_study_of_cifar10() -> None:
    cfg = FinetuneConfig.load(CONFIGS / "cifar10.yaml")
    size = cfg.batch.global_size
    assert cfg.optim.lr_per_256 * size / 256 == pytest.approx(5e-4)
    assert cfg.data.lanes is not None
    per_lane = 50_000 // cfg.data.lanes
    assert per_lane // (size // cfg.data.lanes) == 390
