"""Settings and plan of pretraining."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foveal.config import machine, science
from foveal.errors import ConfigError
from foveal.models.mae import DecoderConfig
from foveal.models.masks import MaskStrategy, resolve_mask_block_size
from foveal.models.vit import VitConfig
from foveal.optim.schedule import cosine_ema_decay
from foveal.training.config import StageConfig
from foveal.training.plan import Plan, build_stage_plan
from pretrain.init import InitSource, inspect_init_weights
from pretrain.objective import PredictionTarget


class PretrainConfig(StageConfig):
    """Pretraining of a masked autoencoder."""

    init: str | None = machine(
        None,
        "Initial encoder weights: an export, or a safetensors file (or its folder) under timm's or Hugging Face's "
        "names; null: random. Their content is science, their path is not.",
    )
    model: VitConfig = VitConfig()
    decoder: DecoderConfig = DecoderConfig()
    mask_ratio: float = science(0.75, "Fraction of patches masked.", gt=0, lt=1)
    mask_strategy: MaskStrategy = science(
        "random", "Patches are masked one by one (random), in square blocks (block), or all but one per cell (grid)."
    )
    mask_block_size: int = science(4, "Side of a block, in patches, for mask_strategy=block.", ge=2)
    norm_pix: bool = science(True, "Normalise the target pixels per patch.")
    target: PredictionTarget = science(
        "pixels", "Prediction target of masked patches: pixels, or features of the EMA encoder (latents)."
    )
    image_loss_weight: float = science(
        0.0, "Weight of predicting the full image's mean feature from the class token; 0: off.", ge=0
    )
    image_target: Literal["averaged", "own"] = science(
        "averaged",
        "Encoder of the full image: the EMA encoder (averaged), or the trained encoder without gradient (own).",
    )
    ema_decay: float = science(0.996, "EMA decay per step at the start; rises to 1 along half a cosine.", ge=0, lt=1)

    @property
    def uses_ema(self) -> bool:
        """Whether the model has an EMA encoder."""
        return self.target == "latents" or (self.image_loss_weight > 0 and self.image_target == "averaged")


@dataclass(frozen=True)
class PretrainPlan(Plan):
    """A plan with the side of a mask block, in patches, and the source of the initial weights."""

    cfg: PretrainConfig
    mask_block_size: int = 1
    init_source: InitSource | None = None

    def ema_decay_at(self, step: int) -> float:
        """Return the EMA decay after a step."""
        return cosine_ema_decay(step, start_decay=self.cfg.ema_decay, total_steps=self.total_steps)

    def summary_lines(self) -> list[str]:
        return super().summary_lines() + ([] if self.init_source is None else self.init_source.summary_lines())


def plan_pretraining(cfg: PretrainConfig, world_size: int) -> PretrainPlan:
    """Return the checked plan of these settings. Raises: ConfigError, DataError, ExportError."""
    _check_target(cfg)
    model, size = cfg.model.resolve_for_image(cfg.data.image_size), cfg.data.image_size
    mask_block_size = resolve_mask_block_size(
        cfg.mask_strategy, *model.patch_grid(size), cfg.mask_ratio, cfg.mask_block_size
    )
    if cfg.init is None:
        return build_stage_plan(PretrainPlan, cfg, world_size, mask_block_size=mask_block_size)
    init_source = inspect_init_weights(Path(cfg.init), model, cfg.data)
    height, width = (patches * model.patch for patches in init_source.patch_grid)
    trained_size = height if height == width else (height, width)
    return build_stage_plan(
        PretrainPlan,
        cfg,
        world_size,
        source_card=init_source.card,
        extra_science={"init": init_source.sha256},
        mask_block_size=mask_block_size,
        init_source=init_source,
        resized_from=None if trained_size == size else trained_size,
    )


def _check_target(cfg: PretrainConfig) -> None:
    if cfg.target == "latents" and cfg.image_loss_weight and cfg.image_target == "own":
        raise ConfigError(
            "image_target=online and target=features exclude each other: target=features uses the EMA encoder; set "
            "image_target=ema"
        )
    if cfg.target == "latents" and cfg.log.images_every:
        raise ConfigError(
            "log.images_every shows reconstructed pixels, and target=features reconstructs none; remove it"
        )
    if cfg.init is not None and not cfg.optim.warmup_epochs:
        raise ConfigError(
            "init with optim.warmup_epochs=0: the first gradients of an untrained decoder would reach trained weights "
            "at the full learning rate; set optim.warmup_epochs"
        )
