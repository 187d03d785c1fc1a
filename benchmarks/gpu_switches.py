"""Parts of a step switched off or exchanged, one at a time: the step without over the step as it is. Run by gpu.py.

Both take turns in one process, on the same images on the device, and the ratio of neighbours is taken.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from step import GPU_BATCH, SHAPES
from step_changes import WITHOUT
from step_contenders import CONTENDERS, Contender, Shape, Switches
from torch.nn.attention import SDPBackend, sdpa_kernel

_ROUNDS, _STEPS = 5, 3
TINY = Shape("vit_tiny_patch16_224", 32, 8, (24, 1, 2), 4)  # of a rehearsal
_AS_IT_IS = Switches(fused_adamw=True, reads_every_loss=False)


@dataclass(frozen=True)
class Switch:
    """What a step is built with, and the contexts around its build and its steps."""

    around_build: Callable[[], AbstractContextManager[Any]] = nullcontext
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext
    switches: Switches = _AS_IT_IS


SWITCHES = {
    "attention: flash only": Switch(around_step=partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
    "attention: cuDNN only": Switch(around_step=partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
    "attention: memory-efficient only": Switch(around_step=partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)),
    "attention: explicit products": Switch(switches=replace(_AS_IT_IS, explicit_attention=True)),
} | {f"without: {change}": Switch(*contexts) for change, contexts in WITHOUT.items()}

SWITCH_HEADING = ("| change | ms a step, as it is | changed over as it is | loss |", "|---|--:|--:|--:|")


class SwitchedSteps:
    """ViT-B/16 in bf16 under the plain engine: 256 images a step on a GPU; in a rehearsal a tiny model."""

    def __init__(self, device: torch.device, *, is_rehearsal: bool) -> None:
        self._shape = TINY if is_rehearsal else replace(SHAPES["ViT-B/16"], batch=GPU_BATCH)
        size = (self._shape.batch, 3, self._shape.image, self._shape.image)
        self._images = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        self._as_it_is: Contender | None = None

    def row(self, name: str) -> Iterator[str]:
        """Yield the row of a switch."""
        if self._as_it_is is None:
            self._as_it_is = self._build(_AS_IT_IS)
            self._seconds(self._as_it_is)
        switch = SWITCHES[name]
        with switch.around_build():
            changed = self._build(switch.switches)
        with switch.around_step():
            loss = changed.train(1)
            self._seconds(changed)
        times, ratios = [], []
        for _ in range(_ROUNDS):
            times.append(self._seconds(self._as_it_is))
            with switch.around_step():
                ratios.append(self._seconds(changed) / times[-1])
        yield (
            f"| {name} | {1e3 * statistics.median(times):.2f} | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}-{max(ratios):.3f}) | {loss:.4f} |"
        )

    def _build(self, switches: Switches) -> Contender:
        return CONTENDERS["foveal"](self._shape, self._images, "bf16", switches)

    @staticmethod
    def _seconds(contender: Contender) -> float:
        """Seconds a step; reading the last loss waits for the device."""
        start = time.perf_counter()
        contender.train(_STEPS)
        return (time.perf_counter() - start) / _STEPS
