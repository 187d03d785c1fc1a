"""Statistics of BatchNorm in adversarial training: separate ones for attacked images, and none kept of an attack's search."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


def find_batch_norms(model: nn.Module) -> list[Any]:
    """Every BatchNorm inside a model."""
    return [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001


def add_auxiliary_batch_norms(model: nn.Module) -> nn.ModuleList:
    """Twins of every BatchNorm, for attacked images: ``norms_of`` chooses them (Xie et al., "AdvProp", 2020).

    They begin as the norms are, and are no part of the model, whose weights keep their names.
    """
    twins = nn.ModuleList()
    for norm in find_batch_norms(model):
        twin = copy.deepcopy(norm)
        twins.append(twin)
        norm.attacked = False
        norm.forward = partial(_forward_selected_norm, norm, norm.forward, twin)
    return twins


@contextmanager
def use_auxiliary_batch_norms(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Let the norms that have a twin pass on to it, or not."""
    split = [norm for norm in find_batch_norms(model) if hasattr(norm, "attacked")]
    for norm in split:
        norm.attacked = enabled
    try:
        yield
    finally:
        for norm in split:
            norm.attacked = False


@contextmanager
def preserve_batch_norm_stats(model: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are, whatever is shown to the model meanwhile."""
    norms = find_batch_norms(model)
    kept = [norm._buffers for norm in norms]  # noqa: SLF001
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers = {name: None if each is None else each.clone() for name, each in buffers.items()}  # noqa: SLF001
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers = buffers  # noqa: SLF001


def _forward_selected_norm(norm: Any, forward: Any, twin: nn.Module, images: Tensor) -> Tensor:
    return twin(images) if norm.attacked else forward(images)
