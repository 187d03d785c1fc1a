"""Settings of probes: the features of a frozen encoder, and the classifiers trained on them."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from foveal.config import Config, machine, science

ProbeKind = Literal["linear", "logistic", "attentive", "knn"]
FeatureSource = Literal["token", "avg", "both"]
_Rate = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]


class ProbeConfig(Config):
    """Probes of a frozen encoder, on features that are computed once and cached in the run directory.

    The heads trained by gradient steps use ``epochs``, ``batch.global_size`` and ``optim`` of the stage: linear heads by
    LARS, which ignores AdamW's settings, attentive heads by AdamW.
    """

    kinds: tuple[ProbeKind, ...] = science(
        ("linear",),
        "Classifiers on the features: a linear head by LARS (MAE's, on fixed views), scikit-learn's logistic regression, "
        "attentive pooling with one query, or k nearest neighbours.",
        min_length=1,
    )
    layers: Literal["all"] | tuple[_Count, ...] | None = science(
        None, "Blocks, from 1, to probe, each through the encoder's final norm; all: every block; null: the last block."
    )
    features: FeatureSource | None = science(
        None, "Feature of a layer: class token, mean of the patch tokens, or both; null: as pooling."
    )
    max_gigabytes: float = machine(50.0, "Largest size of the cached features, in 10^9 bytes.", gt=0)
    linear_lr_per_256: tuple[_Rate, ...] = science(
        (0.1,), "Learning rates of the linear heads; all heads train in one pass.", min_length=1
    )
    logistic_c: tuple[_Rate, ...] = science(
        (1.0,), "Inverse strengths C of the L2 penalty of logistic regression, as in scikit-learn.", min_length=1
    )
    attentive_lr_per_256: tuple[_Rate, ...] = science(
        (1e-3,), "Learning rates of the attentive heads; all heads train in one pass.", min_length=1
    )
    k: tuple[_Count, ...] = science((20,), "Numbers of neighbours to try.", min_length=1)
    vote: Literal["softmax", "uniform"] = science(
        "softmax", "Weight of a neighbour's vote. softmax: exp(similarity / temperature), as in DINO; uniform: 1."
    )
    metric: Literal["cosine", "euclidean"] = science("cosine", "Distance of the nearest neighbours.")
    temperature: float = science(0.07, "Temperature of softmax votes.", gt=0)

    def resolve_layer_numbers(self, depth: int) -> tuple[int, ...]:
        """Return the probed blocks, ascending."""
        if self.layers is None:
            return (depth,)
        return tuple(range(1, depth + 1)) if self.layers == "all" else tuple(sorted(set(self.layers)))

    @property
    def reads_pooled(self) -> bool:
        """Whether a probe reads pooled features."""
        return any(kind != "attentive" for kind in self.kinds)

    @property
    def reads_patches(self) -> bool:
        """Whether a probe reads patch tokens."""
        return "attentive" in self.kinds


# The hyperparameter of each kind that is selected on the holdout: its name in the results, and its candidate values.
HYPERPARAMETERS: dict[ProbeKind, tuple[str, Callable[[ProbeConfig], tuple[float, ...]]]] = {
    "linear": ("lr_per_256", lambda probe: probe.linear_lr_per_256),
    "logistic": ("c", lambda probe: probe.logistic_c),
    "attentive": ("lr_per_256", lambda probe: probe.attentive_lr_per_256),
    "knn": ("k", lambda probe: probe.k),
}
