"""The plan of a pretraining run."""

from dataclasses import dataclass
from pathlib import Path

from foveal.models.masks import resolve_mask_block_size
from foveal.models.vit import resolve_sizes_for_image
from foveal.optim.schedule import cosine_ema_decay
from foveal.training.plan import Plan, build_stage_plan
from foveal.weights.pretrained import SourceModel
from pretrain.config import PretrainConfig
from pretrain.init import InitSource, inspect_init_weights


@dataclass(frozen=True)
class PretrainPlan(Plan):
    """A plan with the side of a mask block, in patches, and the source of the initial weights."""

    cfg: PretrainConfig
    mask_block_size: int = 1
    init_source: InitSource | None = None

    @property
    def source_models(self) -> dict[str, SourceModel]:
        source = self.init_source
        return {} if source is None else {"init": SourceModel(source.path, source.sha256, source.card)}

    def ema_decay_at(self, step: int) -> float:
        """Return the EMA decay after a step."""
        return cosine_ema_decay(step, start_decay=self.cfg.ema_decay, total_steps=self.total_steps)

    def summary_lines(self) -> list[str]:
        return super().summary_lines() + ([] if self.init_source is None else self.init_source.summary_lines())


def plan_pretraining(cfg: PretrainConfig, world_size: int) -> PretrainPlan:
    """Return the checked plan of these settings. Raises: ConfigError, DataError, ExportError."""
    model, size = resolve_sizes_for_image(cfg.model, cfg.data.image_size), cfg.data.image_size
    mask_block_size = resolve_mask_block_size(
        cfg.mask_strategy, *model.patch_grid(size), cfg.mask_ratio, cfg.mask_block_size
    )
    if cfg.init is None:
        return build_stage_plan(PretrainPlan, cfg, world_size, mask_block_size=mask_block_size)
    init_source = inspect_init_weights(Path(cfg.init), model, cfg.data, cfg.decoder if cfg.init_decoder else None)
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
