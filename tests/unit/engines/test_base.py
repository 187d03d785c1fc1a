"""What engines share: the update of an EMA."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.engines.base import lerp_all_, update_ema_replicated


@pytest.mark.parametrize("weight", [0.0, 1e-9, 0.004, 0.1, 1 / 3, 0.49999, 0.5, 0.50001, 0.996, 1.0])
def test_all_at_once_is_each_alone_bit_for_bit(weight: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[torch.Tensor]:
        scale = torch.logspace(-20, 20, 1000)
        return [(torch.randn(rows, 1000, generator=generator) * scale).to(device) for rows in (1, 3, 7, 0, 1)]

    averages, sources = draw(), draw()
    before = [average.clone() for average in averages]
    lerp_all_(
        list(zip(averages, sources, strict=True)), torch.tensor(weight, device=device) * torch.zeros((), device=device)
    )
    assert all(average.equal(left) for average, left in zip(averages, before, strict=True)), "weight 0"
    expected = [average.clone().lerp_(source, weight) for average, source in zip(averages, sources, strict=True)]
    lerp_all_(list(zip(averages, sources, strict=True)), torch.tensor(weight, device=device))
    assert all(average.equal(right) for average, right in zip(averages, expected, strict=True))


def test_an_ema_is_one_operation_for_all_parameters() -> None:
    class Count(TorchDispatchMode):
        operators: tuple[str, ...] = ()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += (func.name(),)
            return func(*args, **(kwargs or {}))

    module = nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for name in ("averaged", "encoder")})
    weight = torch.ones(())
    with Count() as count:
        update_ema_replicated(module, "averaged.", "encoder.", weight)
    assert count.operators == ("aten::_foreach_lerp_.List",)
    assert all(
        average.equal(source)
        for average, source in zip(module["averaged"].parameters(), module["encoder"].parameters(), strict=True)
    )
