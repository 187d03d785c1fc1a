"""The settings of pretraining, and the plan they come to."""

from dataclasses import dataclass

from foveal.config import science
from foveal.models.mae import DecoderConfig
from foveal.models.vit import VitConfig
from foveal.stage import Plan, StageConfig, planned


class PretrainConfig(StageConfig):
    """A masked autoencoder."""

    model: VitConfig = VitConfig()
    decoder: DecoderConfig = DecoderConfig()
    mask_ratio: float = science(0.75, "Share of the patches that the encoder does not see.", gt=0, lt=1)
    norm_pix: bool = science(True, "Predict pixels normalised patch by patch.")


@dataclass(frozen=True)
class PretrainPlan(Plan):
    """Pretraining inherits nothing but the data."""

    cfg: PretrainConfig


def plan(cfg: PretrainConfig, ranks: int) -> PretrainPlan:
    """Everything that can be refused before a run begins. Errors: ConfigError, DataError."""
    cfg.model.fitted(cfg.data.image_size)
    return planned(PretrainPlan, cfg, ranks)
