"""The settings of pretraining, and the plan they come to."""

from dataclasses import dataclass
from pathlib import Path

from foveal.config import machine, science
from foveal.models.mae import DecoderConfig
from foveal.models.masks import Masking, mask_side
from foveal.models.vit import VitConfig
from foveal.stage import Plan, StageConfig, planned
from pretrain.init import Start, started


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
    masking: Masking = science(
        "random", "Patches are masked one by one, in square blocks, or all but one in each cell."
    )
    mask_block: int = science(4, "Side of a block in patches, for masking=block.", ge=2)
    norm_pix: bool = science(True, "Predict pixels normalised patch by patch.")


@dataclass(frozen=True)
class PretrainPlan(Plan):
    """A plan that knows the side of what is masked at once, in patches, and the weights that it goes on from."""

    cfg: PretrainConfig
    mask_side: int = 1
    start: Start | None = None

    def lines(self) -> list[str]:
        return super().lines() + ([] if self.start is None else self.start.lines())


def plan(cfg: PretrainConfig, ranks: int) -> PretrainPlan:
    """Everything that can be refused before a run begins. Errors: ConfigError, DataError, ExportError."""
    model, size = cfg.model.fitted(cfg.data.image_size), cfg.data.image_size
    side = mask_side(cfg.masking, *model.grid(size), cfg.mask_ratio, cfg.mask_block)
    if cfg.init is None:
        return planned(PretrainPlan, cfg, ranks, mask_side=side)
    start = started(Path(cfg.init), model, cfg.data)
    rows, columns = (patches * model.patch for patches in start.grid)
    was = rows if rows == columns else (rows, columns)
    return planned(
        PretrainPlan,
        cfg,
        ranks,
        card=start.card,
        origin={"init": start.sha256},
        mask_side=side,
        start=start,
        resized_from=None if was == size else was,
    )
