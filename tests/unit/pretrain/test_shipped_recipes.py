"""Shipped configs that name a source against its values; docs/differences.md has what differs on purpose."""

from pathlib import Path

import pytest

from distill.config import DistillConfig
from pretrain.config import PretrainConfig

CONFIGS = Path(__file__).parents[3] / "configs"


def pretraining(name: str) -> PretrainConfig:
    return PretrainConfig.load(CONFIGS / "pretrain" / f"{name}.yaml")


@pytest.mark.parametrize(
    ("name", "model", "epochs"),
    [
        ("mae_vit_b16", "vit_base_patch16_224", 800),  # PRETRAIN.md
        ("mae_vit_l16", "vit_large_patch16_224", 1600),  # table 3
        ("mae_vit_h14", "vit_huge_patch14_224", 1600),  # table 3
    ],
)
def test_mae(name: str, model: str, epochs: int) -> None:
    """facebookresearch/mae: PRETRAIN.md, main_pretrain.py and models_mae.py; table 8 of the paper."""
    cfg = pretraining(name)
    optim, augment, decoder = cfg.optim, cfg.data.augment, cfg.decoder
    assert (cfg.model.name, cfg.epochs, cfg.batch.global_size) == (model, epochs, 4096)
    assert (cfg.mask_ratio, cfg.mask_strategy, cfg.norm_pix, cfg.target) == (0.75, "random", True, "pixels")
    assert (optim.name, optim.lr_per_256, optim.weight_decay, optim.betas) == ("adamw", 1.5e-4, 0.05, (0.9, 0.95))
    assert (optim.schedule, optim.warmup_epochs, optim.min_lr, optim.max_grad_norm) == ("cosine", 40, 0, None)
    assert (augment.scale, augment.ratio, augment.hflip) == ((0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (cfg.data.image_size, cfg.data.mean, cfg.data.std) == (
        224,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    assert (decoder.width, decoder.depth, decoder.heads, decoder.mlp_ratio) == (512, 8, 16, 4)


def test_another_batch_is_the_only_difference() -> None:
    base, other = (pretraining(name).science_settings() for name in ("mae_vit_b16", "mae_vit_b16_b5760"))
    assert {name for name, value in base.items() if other[name] != value} == {"batch.global_size", "data.lanes"}


def test_mae_on_cifar10() -> None:
    """IcarusWizard/MAE: mae_pretrain.py and model.py."""
    cfg = pretraining("cifar10")
    optim, decoder = cfg.optim, cfg.decoder
    assert (cfg.epochs, cfg.batch.global_size, cfg.mask_ratio, cfg.norm_pix) == (2000, 4096, 0.75, False)
    assert (optim.lr_per_256, optim.weight_decay, optim.betas, optim.warmup_epochs) == (1.5e-4, 0.05, (0.9, 0.95), 200)
    assert (cfg.model.name, cfg.model.patch) == ("vit_tiny_patch16_224", 2)
    assert (decoder.width, decoder.depth, decoder.heads) == (192, 4, 3)


def test_dmae() -> None:
    """UCSC-VLAA/DMAE: pretrain.sh and models_mae_distill.py."""
    cfg = DistillConfig.load(CONFIGS / "distill" / "digits_layers.yaml")
    assert (cfg.method, cfg.layer_loss, cfg.distance, cfg.norm_pix) == ("layers", "dmae", "unit_l1", False)
    assert (cfg.mask_ratio, cfg.pixel_weight) == (0.75, 1.0)


def test_the_large_distillation_has_tinymims_epochs_and_maes_optimizer() -> None:
    """OliverRensu/TinyMIM: README.md."""
    cfg = DistillConfig.load(CONFIGS / "distill" / "mae_vit_s16.yaml")
    assert (cfg.epochs, cfg.optim.warmup_epochs, cfg.optim.lr_per_256, cfg.optim.weight_decay) == (
        300,
        15,
        1.5e-4,
        0.05,
    )
