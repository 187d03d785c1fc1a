"""bf16 copies of the weights of linear layers, made together in place of one by one.

Autocast casts each weight and each bias when a layer uses it, and each gradient in the backward pass: for a ViT-B's
autoencoder four small operations in each of 83 layers. Values, and so the loss curve, are those of autocast bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.engines.config import EngineConfig

# Layers of a group: about a block. The gradients of a group are ready together, for DDP's buckets.
_LAYERS_PER_GROUP = 4


def make_linear_casts(model: nn.Module, cfg: EngineConfig) -> Callable[[], AbstractContextManager[None]]:
    """Return the context of a microbatch that casts a model's linear layers together; in fp32 it does nothing.

    Nor does it where torch.compile fuses the casts by itself.
    """
    if cfg.precision == "fp32" or cfg.is_compiled:
        return nullcontext
    return _LinearCasts(model).use


class _LinearCasts:
    """Copies for the linear layers of a model whose engine keeps whole fp32 weights on every rank.

    Outside ``use``, as in evaluations, and in layers that are frozen in part or at all, autocast casts the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if type(module) is nn.Linear and _is_trained(module)]
        starts = range(0, len(layers), _LAYERS_PER_GROUP)
        self._groups = [layers[start : start + _LAYERS_PER_GROUP] for start in starts]
        self._casts: dict[nn.Linear, Sequence[Tensor]] = {}
        for layer in layers:
            layer.forward = partial(self._forward, layer)  # pyright: ignore[reportAttributeAccessIssue] - hooks of the layer still run

    @contextmanager
    def use(self) -> Iterator[None]:
        """Cast the weights, and compute with the copies inside the context: that of one microbatch."""
        for layers in self._groups:
            parameters = [list(layer.parameters()) for layer in layers]
            casts = iter(_CastTogether.apply(*(parameter for group in parameters for parameter in group)))
            for layer, group in zip(layers, parameters, strict=True):
                self._casts[layer] = [next(casts) for _ in group]
        try:
            yield
        finally:
            self._casts.clear()

    def _forward(self, layer: nn.Linear, inputs: Tensor) -> Tensor:
        casts = self._casts.get(layer)
        if casts is None:
            return F.linear(inputs, layer.weight, layer.bias)
        return F.linear(inputs, *casts)


def _is_trained(layer: nn.Linear) -> bool:
    return all(parameter.requires_grad for parameter in layer.parameters())


class _CastTogether(torch.autograd.Function):
    """bf16 copies of fp32 tensors in one operation, and fp32 gradients of bf16 ones in another."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_cast(weights, torch.bfloat16))

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        casts = iter(_cast([gradient for gradient in gradients if gradient is not None], torch.float32))
        return tuple(None if gradient is None else next(casts) for gradient in gradients)


def _cast(tensors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if casts:
        torch._foreach_copy_(casts, tensors)
    return casts
