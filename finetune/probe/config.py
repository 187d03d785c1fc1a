"""The settings of probes: what is read of a frozen encoder, and what is learned on it."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from foveal.config import Config, machine, science

ProbeKind = Literal["linear", "logistic", "attentive", "knn"]
FeatureSource = Literal["token", "avg", "both"]
_Rate = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]


class ProbeConfig(Config):
    """Probes on features that are computed once and kept in the run directory; the encoder stays as it is.

    ``epochs``, ``batch.images`` and ``optim`` beside this section are those of the heads that learn by steps: linear by
    LARS, which has no use for AdamW's settings, and attentive by AdamW.
    """

    kinds: tuple[ProbeKind, ...] = science(
        ("linear",),
        "What reads the features: a linear head by LARS (MAE's protocol), scikit-learn's logistic regression, one "
        "query that attends to the patches, or nearest neighbours.",
        min_length=1,
    )
    layers: Literal["all"] | tuple[_Count, ...] | None = science(
        None, "Blocks, from 1, whose output is read, through the encoder's last norm; all; none: the last."
    )
    features: FeatureSource | None = science(
        None, "What is read of a layer: class token, mean of the patches, or both; none: as pooling says."
    )
    gigabytes: float = machine(50.0, "The most that the kept features may take, in 10^9 bytes.", gt=0)
    linear_lr_per_256: tuple[_Rate, ...] = science(
        (0.1,), "Rates of the linear heads; all learn at once.", min_length=1
    )
    logistic_c: tuple[_Rate, ...] = science(
        (1.0,), "Inverse strengths of logistic's L2 penalty, scikit-learn's C.", min_length=1
    )
    attentive_lr_per_256: tuple[_Rate, ...] = science(
        (1e-3,), "Rates of the attentive heads; all learn at once.", min_length=1
    )
    k: tuple[_Count, ...] = science((20,), "Numbers of neighbours.", min_length=1)
    vote: Literal["softmax", "uniform"] = science(
        "softmax", "A neighbour's vote: exp(similarity / temperature), as in DINO, or 1."
    )
    metric: Literal["cosine", "euclidean"] = science("cosine", "What is near.")
    temperature: float = science(0.07, "Of softmax votes.", gt=0)

    def resolve_layers(self, depth: int) -> tuple[int, ...]:
        """The blocks that are read, ascending."""
        if self.layers is None:
            return (depth,)
        return tuple(range(1, depth + 1)) if self.layers == "all" else tuple(sorted(set(self.layers)))

    @property
    def reads_pooled(self) -> bool:
        """Whether a feature of the whole image is read."""
        return any(kind != "attentive" for kind in self.kinds)

    @property
    def reads_patches(self) -> bool:
        """Whether every patch is read."""
        return "attentive" in self.kinds


# What of each kind is chosen on the holdout: its name in the results, and the values that there are.
HYPERPARAMETERS: dict[ProbeKind, tuple[str, Callable[[ProbeConfig], tuple[float, ...]]]] = {
    "linear": ("lr_per_256", lambda probe: probe.linear_lr_per_256),
    "logistic": ("c", lambda probe: probe.logistic_c),
    "attentive": ("lr_per_256", lambda probe: probe.attentive_lr_per_256),
    "knn": ("k", lambda probe: probe.k),
}
