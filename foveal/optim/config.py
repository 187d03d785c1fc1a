"""Settings of the optimizer and its learning-rate schedule."""

from typing import Annotated, Literal

from pydantic import Field

from foveal.config import Config, machine, science

Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class OptimConfig(Config):
    """An optimizer (AdamW: Loshchilov & Hutter, 2019) with warm-up and learning-rate schedule."""

    name: Literal["adamw", "sgd", "lars"] = science(
        "adamw", "The optimizer: AdamW, SGD with momentum, or LARS (You et al., 2017)."
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
        0.05, "Decoupled for AdamW, L2 for SGD and LARS; vectors, tokens and positions are excluded.", ge=0
    )
    momentum: float = science(0.9, "For sgd and lars: momentum coefficient.", ge=0, lt=1)
    betas: Betas = science((0.9, 0.95), "For adamw: decay rates of the two moments.")
    eps: float = science(1e-8, "For adamw: epsilon of the denominator.", gt=0)
    layer_decay: float = science(1.0, "Factor on the learning rate per block below the head (BEiT, 2021).", gt=0, le=1)
    max_grad_norm: float | None = science(None, "Maximum global gradient norm; null: no clipping.", gt=0)
    fused: bool = machine(True, "For adamw: use torch's fused kernel.")

    def peak_lr(self, batch_size: int) -> float:
        """Return the peak learning rate for a global batch size in images."""
        return self.lr_per_256 * batch_size / 256

    @property
    def moments_per_parameter(self) -> int:
        """Number of optimizer moments per trained parameter element."""
        return 2 if self.name == "adamw" else int(self.momentum > 0)
