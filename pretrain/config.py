"""Settings of pretraining."""

from typing import Literal

from foveal.config import machine, science
from foveal.models.config import DecoderConfig, MaskStrategy, VitConfig
from foveal.rules import excludes, requires
from foveal.training.config import NO_PLATEAU_SCHEDULE, StageConfig

PredictionTarget = Literal["pixels", "features"]


class PretrainConfig(StageConfig):
    """Pretraining of a masked autoencoder."""

    init: str | None = machine(
        None,
        "Initial encoder weights: an export, or weights of others (safetensors or of torch.save, a file or its folder) "
        "under timm's, Hugging Face's or DINO's names; null: random. Their content is science, their path is not.",
    )
    init_decoder: bool = science(
        False,
        "Take the decoder from init too, as from MAE's full checkpoints and Hugging Face's ViTMAEForPreTraining.",
        since="0.2",
        neutral=False,
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
        "pixels", "Prediction target of masked patches: pixels, or features of the EMA encoder."
    )
    image_loss_weight: float = science(
        0.0, "Weight of predicting the full image's mean feature from the class token; 0: off.", ge=0
    )
    image_target: Literal["ema", "online"] = science(
        "ema", "Encoder of the full image: the EMA encoder (ema), or the trained encoder without gradient (online)."
    )
    ema_decay: float = science(0.996, "EMA decay per step at the start; rises to 1 along half a cosine.", ge=0, lt=1)

    main_settings = ("init", "model.name", "mask_ratio", "target", *StageConfig.main_settings)
    rules = (
        *StageConfig.rules,
        NO_PLATEAU_SCHEDULE,
        excludes(
            "target=features",
            "image_loss_weight>0",
            "image_target=online",
            because="target=features has an EMA encoder, which image_target=online leaves unused",
            remedy="set image_target=ema",
        ),
        excludes(
            "target=features",
            "log.images_every>0",
            because="reconstructed pixels are drawn, and target=features reconstructs none",
            remedy="set log.images_every=0",
        ),
        requires(
            "init_decoder=true",
            "init",
            because="the decoder comes from the file of init",
            remedy="set init, or leave init_decoder out",
        ),
        excludes(
            "init_decoder=true",
            "target=features",
            because="decoders of others predict pixels",
            remedy="set target=pixels, or leave init_decoder out",
        ),
        requires(
            "init",
            "optim.warmup_epochs>0",
            because="an untrained decoder's first gradients would reach trained weights at the full learning rate",
            remedy="set optim.warmup_epochs",
        ),
    )

    @property
    def uses_ema(self) -> bool:
        """Whether the model has an EMA encoder."""
        return self.target == "features" or (self.image_loss_weight > 0 and self.image_target == "ema")
