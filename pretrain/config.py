"""The settings of pretraining, and the plan they come to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foveal.config import machine, science
from foveal.errors import ConfigError
from foveal.models.mae import DecoderConfig
from foveal.models.masks import MaskStrategy, resolve_mask_block_size
from foveal.models.vit import VitConfig
from foveal.optim.schedule import cosine_ema_decay
from foveal.training.plan import Plan, StageConfig, build_stage_plan
from pretrain.init import InitSource, inspect_init_weights
from pretrain.objective import PredictionTarget


class PretrainConfig(StageConfig):
    """A masked autoencoder."""

    init: str | None = machine(
        None,
        "Encoder weights to go on from: an export, or a safetensors file (or its folder) under timm's or Hugging Face's "
        "names; none: from scratch. What is in it is science.",
    )
    model: VitConfig = VitConfig()
    decoder: DecoderConfig = DecoderConfig()
    mask_ratio: float = science(0.75, "Share of the patches that the encoder does not see.", gt=0, lt=1)
    masking: MaskStrategy = science(
        "random", "Patches are masked one by one, in square blocks, or all but one in each cell."
    )
    mask_block: int = science(4, "Side of a block in patches, for masking=block.", ge=2)
    norm_pix: bool = science(True, "Predict pixels normalised patch by patch.")
    target: PredictionTarget = science(
        "pixels", "What of the masked patches is predicted: pixels, or an averaged encoder's features."
    )
    image_weight: float = science(
        0.0, "Weight of predicting the full image's representation from the class token; 0: none.", ge=0
    )
    image_target: Literal["averaged", "own"] = science(
        "averaged", "Whose representation: the averaged encoder's, or the encoder's own, which keeps no state."
    )
    average: float = science(
        0.996, "What the averaged encoder keeps of itself in a step; rises to 1 along half a cosine.", ge=0, lt=1
    )

    @property
    def uses_ema(self) -> bool:
        """Whether a running average of the encoder is kept."""
        return self.target == "latents" or (self.image_weight > 0 and self.image_target == "averaged")


@dataclass(frozen=True)
class PretrainPlan(Plan):
    """A plan that knows the side of what is masked at once, in patches, and the weights that it goes on from."""

    cfg: PretrainConfig
    mask_block_size: int = 1
    init_source: InitSource | None = None

    def ema_decay_at(self, step: int) -> float:
        """What the averaged encoder keeps of itself after a step."""
        return cosine_ema_decay(step, start_decay=self.cfg.average, total_steps=self.total_steps)

    def summary_lines(self) -> list[str]:
        return super().summary_lines() + ([] if self.init_source is None else self.init_source.summary_lines())


def plan_pretraining(cfg: PretrainConfig, world_size: int) -> PretrainPlan:
    """Everything that can be refused before a run begins. Raises: ConfigError, DataError, ExportError."""
    _check_target(cfg)
    model, size = cfg.model.resolve_for_image(cfg.data.image_size), cfg.data.image_size
    side = resolve_mask_block_size(cfg.masking, *model.patch_grid(size), cfg.mask_ratio, cfg.mask_block)
    if cfg.init is None:
        return build_stage_plan(PretrainPlan, cfg, world_size, mask_block_size=side)
    start = inspect_init_weights(Path(cfg.init), model, cfg.data)
    rows, columns = (patches * model.patch for patches in start.patch_grid)
    was = rows if rows == columns else (rows, columns)
    return build_stage_plan(
        PretrainPlan,
        cfg,
        world_size,
        source_card=start.card,
        extra_science={"init": start.sha256},
        mask_block_size=side,
        init_source=start,
        resized_from=None if was == size else was,
    )


def _check_target(cfg: PretrainConfig) -> None:
    if cfg.target == "latents" and cfg.image_weight and cfg.image_target == "own":
        raise ConfigError(
            "image_target=own and target=latents exclude each other: latents are the averaged encoder's, so image_target is too"
        )
    if cfg.target == "latents" and cfg.log.pictures_every:
        raise ConfigError(
            "log.pictures_every shows reconstructed pixels, and target=latents reconstructs none; leave it out"
        )
    if cfg.init is not None and not cfg.optim.warmup_epochs:
        raise ConfigError(
            "init with optim.warmup_epochs=0: the first gradients of a fresh decoder would reach trained weights at the full "
            "rate; set some epochs"
        )
