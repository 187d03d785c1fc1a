"""The settings of pretraining, and the plan they come to."""

from dataclasses import dataclass

from foveal.config import science
from foveal.models.mae import DecoderConfig
from foveal.models.masks import Masking, mask_side
from foveal.models.vit import VitConfig
from foveal.stage import Plan, StageConfig, planned


class PretrainConfig(StageConfig):
    """A masked autoencoder."""

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
    """A plan that knows the side of what is masked at once, in patches; it inherits nothing but the data."""

    cfg: PretrainConfig
    mask_side: int = 1


def plan(cfg: PretrainConfig, ranks: int) -> PretrainPlan:
    """Everything that can be refused before a run begins. Errors: ConfigError, DataError."""
    rows, columns = cfg.model.fitted(cfg.data.image_size).grid(cfg.data.image_size)
    side = mask_side(cfg.masking, rows, columns, cfg.mask_ratio, cfg.mask_block)
    return planned(PretrainPlan, cfg, ranks, mask_side=side)
