"""Settings of the optimizer and its learning-rate schedule."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from foveal.config import Config, machine, science

Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
MUON_MOMENTUM = 0.95  # as in Jordan et al.


class OptimConfig(Config):
    """An optimizer (AdamW: Loshchilov & Hutter, 2019) with warm-up and learning-rate schedule."""

    name: Literal["adamw", "sgd", "lars", "muon"] = science(
        "adamw",
        "The optimizer: AdamW, SGD with momentum, LARS (You et al., 2017), or Muon for hidden matrices with AdamW for "
        "all other parameters (Jordan et al., 2024).",
    )
    lr_per_256: float = science(
        1.5e-4, "Peak learning rate for a step of 256 images; scaled by batch.global_size / 256.", gt=0
    )
    min_lr: float = science(0.0, "Minimum learning rate: the cosine's last value, and the lower bound of drops.", ge=0)
    warmup_epochs: float = science(0.0, "Epochs of linear warm-up.", ge=0)
    schedule: Literal["cosine", "step", "constant", "plateau"] = science(
        "cosine", "Learning rate after the warm-up; plateau (fine-tuning only) follows early_stopping.metric."
    )
    step_epochs: tuple[float, ...] = science((), "For step: ascending epochs after which the learning rate drops.")
    step_factor: float = science(0.1, "For step and plateau: the learning rate's factor at a drop.", gt=0, lt=1)
    plateau_patience: int = science(
        3, "For plateau: evaluations in a row without improvement before the learning rate drops.", ge=1
    )
    weight_decay: float = science(
        0.05,
        "Weight decay, decoupled for AdamW and Muon, L2 for SGD and LARS; vectors, tokens and positions are excluded.",
        ge=0,
    )
    momentum: float = science(0.9, "For sgd, lars and muon: momentum coefficient; muon's default is 0.95.", ge=0, lt=1)
    betas: Betas = science((0.9, 0.95), "For adamw and muon's AdamW: decay rates of the two moments.")
    eps: float = science(1e-8, "For adamw and muon's AdamW: epsilon of the denominator.", gt=0)
    layer_decay: float = science(1.0, "Factor on the learning rate per block below the head (BEiT, 2021).", gt=0, le=1)
    max_grad_norm: float | None = science(None, "Maximum global gradient norm; null: no clipping.", gt=0)
    fused: bool = machine(True, "For adamw and muon's AdamW: use torch's fused kernel.")

    @model_validator(mode="before")
    @classmethod
    def _default_momentum_of_muon(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "muon":
            return {"momentum": MUON_MOMENTUM} | values
        return values

    def peak_lr(self, batch_size: int) -> float:
        """Return the peak learning rate for a global batch size in images."""
        return self.lr_per_256 * batch_size / 256
