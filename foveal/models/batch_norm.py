"""BatchNorm in adversarial training: separate layers for attacked images, running statistics kept during the attack."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


def find_batch_norms(model: nn.Module) -> list[Any]:
    """Return every BatchNorm layer inside a model."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001


def add_auxiliary_batch_norms(model: nn.Module) -> nn.ModuleList:
    """Give every BatchNorm a copy for attacked images, and return the copies (Xie et al., "AdvProp", 2020).

    ``use_auxiliary_batch_norms`` switches to the copies. They are not submodules of the model, whose weights keep their
    names.
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
    """Let every BatchNorm that has an auxiliary copy forward through the copy while ``enabled``."""
    split_norms = [norm for norm in find_batch_norms(model) if hasattr(norm, "attacked")]
    for norm in split_norms:
        norm.attacked = enabled
    try:
        yield
    finally:
        for norm in split_norms:
            norm.attacked = False


@contextmanager
def preserve_batch_norm_stats(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of ``model`` unchanged by forwards inside the context."""
    norms = find_batch_norms(model)
    saved_buffers = [norm._buffers for norm in norms]  # noqa: SLF001
    for norm, buffers in zip(norms, saved_buffers, strict=True):
        copies = {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}
        norm._buffers = copies  # noqa: SLF001
    try:
        yield
    finally:
        for norm, buffers in zip(norms, saved_buffers, strict=True):
            norm._buffers = buffers  # noqa: SLF001


def _forward_selected_norm(norm: Any, forward: Any, twin: nn.Module, images: Tensor) -> Tensor:
    return twin(images) if norm.attacked else forward(images)
