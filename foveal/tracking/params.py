"""Which settings a tracking store gets as params: those that matter. settings.json among the run's files has all."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

MAX_PARAMS = 40
# What people compare runs by, in the order in which they are chosen.
_CORE = (
    *("model.name", "model", "backbone.model", "model.width", "model.depth", "model.patch", "model.image_size"),
    *("init", "teacher", "method", "task", "data.path", "data.image_size", "epochs", "batch.global_size"),
    *("optim.name", "optim.lr_per_256", "optim.warmup_epochs", "optim.weight_decay", "optim.layer_decay"),
    *("mask_ratio", "mask_strategy", "target", "data.samples_per_class", "engine.kind", "engine.precision", "seed"),
)


def choose_params(settings: Mapping[str, Any], changed: Sequence[str]) -> list[str]:
    """Return the names of at most ``MAX_PARAMS`` settings: a core that everybody asks for, then the changed ones.

    changed: science settings with another value than their default. Settings that are null say nothing.
    """
    names = [name for name in _CORE if settings.get(name) is not None]
    names += [name for name in changed if name in settings and name not in names and not name.startswith("inherited.")]
    return names[:MAX_PARAMS]


def is_param(name: str, params: Collection[str], stored: Collection[str]) -> bool:
    """Whether a setting is a param: a chosen one, or one that an older version has logged already."""
    return name in params or name in stored
