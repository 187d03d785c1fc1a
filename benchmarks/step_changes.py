"""What each change to the arithmetic of a step is worth: the product's step against itself without the change.

    PYTHONPATH=.:tests/support python benchmarks/step_changes.py

Both take turns in one process with one thread, and the ratio of neighbours is taken, in seconds of the processor, so
that other work on the machine touches both. Below 1: the change is faster.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from decoding import decode_all_tokens
from loop_steps import ALONE
from machine import described
from operations import Autoencoder, pretraining_steps
from timm.layers.attention import Attention
from torch import Tensor

from foveal.engines import plain
from foveal.engines.config import EngineConfig
from foveal.models.attention import SelfAttention
from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.mae import Decoder
from foveal.training.loop import Step

_PAIRS = 11
SIZES = {
    "ViT-Ti on CIFAR, 4 images": Autoencoder(
        VitConfig(name="vit_tiny_patch16_224", patch=2), DecoderConfig(width=192, depth=4, heads=3), 32, 4
    ),
    "ViT-S on 224 pixels, 2 images": Autoencoder(VitConfig(name="vit_small_patch16_224"), DecoderConfig(), 224, 2),
}


def call_attention_of_timm(
    attention: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """timm's own forward."""
    return Attention.forward(attention, x, attn_mask, is_causal)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# What undoes each change: around the build of the engine, and around each step.
WITHOUT: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "short cuts of the decoder's first and last block": (
        nullcontext,
        partial(replaced, Decoder, "forward", decode_all_tokens),
    ),
    "one copy of attention's gradients": (
        nullcontext,
        partial(replaced, SelfAttention, "forward", call_attention_of_timm),
    ),
    "weights cast together": (
        partial(replaced, plain, "make_linear_casts", lambda _model, _cfg: nullcontext),
        nullcontext,
    ),
}


def seconds(steps: Iterator[Step], around: Callable[[], Any]) -> float:
    """Seconds of the processor for a step."""
    with around():
        start = time.process_time()
        next(steps)
        return time.process_time() - start


def compare(sizes: Autoencoder, precision: str, change: str) -> tuple[float, float, float]:
    """Return the quartiles of the ratio of a step with a change to a step without it."""
    cfg = EngineConfig.model_validate({"kind": "plain", "precision": precision})
    around_build, around_step = WITHOUT[change]
    steps = pretraining_steps(ALONE, cfg, sizes)
    seconds(steps, nullcontext)
    without = pretraining_steps(ALONE, cfg, sizes)
    with around_build():
        seconds(without, around_step)
    ratios = [seconds(steps, nullcontext) / seconds(without, around_step) for _ in range(_PAIRS)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def main() -> None:
    """Print a table of ratios."""
    torch.set_num_threads(1)
    print(f"{described(('torch', 'timm'))}. Medians of {_PAIRS} pairs, and quartiles.\n")
    print("| change | model | precision | ratio | quartiles |\n|---|---|---|---|---|")
    for name, sizes in SIZES.items():
        for change in WITHOUT:
            for precision in ("fp32", "bf16") if change != "weights cast together" else ("bf16",):
                low, middle, high = compare(sizes, precision, change)
                print(f"| {change} | {name} | {precision} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
