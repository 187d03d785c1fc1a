"""What the blocks of a ViT attend to, recorded in a forward that stays as it is.

One image; H heads, N tokens, L patches; the prefix are class token and registers.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


class _AttentionRecorder(TorchFunctionMode):
    """Sees the attention weights of the block that runs: those of torch's fused kernel are computed beside it."""

    def __init__(self, on_attention: Callable[[int, Iterator[Tensor]], None]) -> None:
        super().__init__()
        self._on_attention = on_attention
        self.block: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.block is None:
            return output
        if func is F.scaled_dot_product_attention:
            self._report(_iter_weights(*args, **(kwargs or {})))
        elif func in _SOFTMAX and output.ndim == 4 and output.shape[-1] == output.shape[-2]:
            self._report(iter(output[0]))
        return output

    def _report(self, weights: Iterator[Tensor]) -> None:
        block, self.block = self.block, None  # a block attends once
        assert block is not None
        self._on_attention(block, weights)


def _iter_weights(
    query: Tensor, key: Tensor, _value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
) -> Iterator[Tensor]:
    """Yield the weights [N, N] of each head of the first image, one head at a time: N may be large."""
    scale = kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    num_heads = query.shape[1]
    mask = None if attn_mask is None else attn_mask.expand(query.shape[0], num_heads, *attn_mask.shape[-2:])[0]
    for head in range(num_heads):
        logits = (query[0, head].float() * scale) @ key[0, head].float().T
        if mask is not None:
            is_allowed = mask.dtype == torch.bool
            logits = logits.masked_fill(~mask[head], -math.inf) if is_allowed else logits + mask[head].float()
        yield logits.softmax(dim=-1)


@contextmanager
def recorded_attention(
    blocks: Sequence[nn.Module], on_attention: Callable[[int, Iterator[Tensor]], None]
) -> Iterator[None]:
    """Call ``on_attention`` with a block's number and its weights [N, N] per head of the first image, in every forward.

    A row of weights is a query, and sums to 1. The forward's own values are unchanged.
    """
    recorder = _AttentionRecorder(on_attention)

    def enter(number: int, _module: nn.Module, _args: Any) -> None:
        recorder.block = number

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        recorder.block = None

    handles = []
    for number, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(functools.partial(enter, number)))
        handles.append(block.register_forward_hook(leave))
    try:
        with recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class AttentionMeter:
    """Sums up the attention of images, whose weights are not kept.

    distance: pixels between query and key patches (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, fig. 7):
    per query the mean over keys, weighted by the attention to patches. entropy: of a patch's weights over all tokens.
    """

    grid_hw: tuple[int, int]
    patch_hw: tuple[int, int]
    num_prefix: int
    num_blocks: int
    has_class_token: bool
    distances: list[np.ndarray] = field(default_factory=list)  # per image [blocks, H], pixels
    entropies: list[np.ndarray] = field(default_factory=list)  # per image [blocks, H], nats
    head_maps: list[Tensor] = field(default_factory=list)  # per image: last block's [H, N]; of the class token, or mean
    rollouts: list[Tensor] = field(default_factory=list)  # per image [N], of the same query
    problem: str = ""  # why there is no attention to show

    def __post_init__(self) -> None:
        self._rows: list[tuple[list[float], list[float]]] = []
        self._rollout: Tensor | None = None
        self._distances: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.num_prefix + self.grid_hw[0] * self.grid_hw[1]

    def add(self, block: int, heads: Iterator[Tensor]) -> None:
        """Add a block's weights [N, N] per head of the image that is being encoded."""
        distances, entropies, maps = [], [], []
        mean: Tensor | None = None
        for weights_NN in map(Tensor.float, heads):
            if weights_NN.shape != (self.num_tokens, self.num_tokens):
                self.problem = "its blocks attend to other tokens than the patches of the whole image"
                return
            distances.append(float(self._mean_distance(weights_NN)))
            entropies.append(float(torch.special.entr(weights_NN[self.num_prefix :]).sum(1).mean()))
            maps.append(self._of_query(weights_NN))
            mean = weights_NN if mean is None else mean + weights_NN
        assert mean is not None
        self._rows.append((distances, entropies))
        self._add_to_rollout(mean / len(maps))
        if block == self.num_blocks - 1:
            self.head_maps.append(torch.stack(maps).cpu())

    def end_image(self) -> None:
        """End the image whose blocks were added."""
        if len(self._rows) != self.num_blocks or self._rollout is None:
            self.problem = self.problem or "its blocks have no softmax attention"
        else:
            self.distances.append(np.array([row[0] for row in self._rows]))
            self.entropies.append(np.array([row[1] for row in self._rows]))
            self.rollouts.append(self._of_query(self._rollout).cpu())
        self._rows, self._rollout = [], None

    def uniform_distance(self) -> float:
        """Return the distance, in pixels, of attention that is the same to every patch."""
        return float(_patch_distances(self.grid_hw, self.patch_hw).mean())

    def _add_to_rollout(self, mean_NN: Tensor) -> None:
        """Multiply by a block's mean over heads, half of which is the residual branch (Abnar and Zuidema, 2020)."""
        mixed_NN = 0.5 * (mean_NN + torch.eye(len(mean_NN), device=mean_NN.device))
        self._rollout = mixed_NN if self._rollout is None else mixed_NN @ self._rollout

    def _mean_distance(self, weights_NN: Tensor) -> Tensor:
        if self._distances is None or self._distances.device != weights_NN.device:
            self._distances = _patch_distances(self.grid_hw, self.patch_hw).to(weights_NN.device)
        weights_LL = weights_NN[self.num_prefix :, self.num_prefix :]
        on_patches = weights_LL.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        return ((weights_LL * self._distances).sum(1) / on_patches).mean()

    def _of_query(self, weights_NN: Tensor) -> Tensor:
        """Return the weights [N] of the class token, or of an encoder without one their mean over patches."""
        return weights_NN[0] if self.has_class_token else weights_NN[self.num_prefix :].mean(0)


def _patch_distances(grid_hw: tuple[int, int], patch_hw: tuple[int, int]) -> Tensor:
    """Return the distances [L, L] between the centres of patches, in pixels."""
    rows, columns = (torch.arange(count) * float(side) for count, side in zip(grid_hw, patch_hw, strict=True))
    centres_L2 = torch.cartesian_prod(rows, columns)
    return torch.cdist(centres_L2, centres_L2, compute_mode="donot_use_mm_for_euclid_dist")
