"""What an update keeps of a parameter: the moments, by name, and AdamW's counter of updates."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateRule:
    """What an update keeps and allocates for a parameter.

    ``moments``: names of the tensors of the parameter's shape and dtype in the optimizer's state; a checkpoint stores
    them under these names. ``counts_steps``: the state also has a counter ``step``. ``temporary_copies``: copies of all
    parameters of this rule that exist during an update; temporaries of one parameter at a time do not count.
    """

    moments: tuple[str, ...]
    counts_steps: bool = False
    temporary_copies: int = 0


def get_or_create_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter's moments by name; before its first update they are created as zeros.

    Zeros are exact for SGD and LARS too: without dampening, the first update of a zero buffer is the gradient itself.
    """
    group = next(
        (group for group in optimizer.param_groups if any(member is parameter for member in group["params"])),
        optimizer.param_groups[0],  # ZeRO 3 lends its partitions to the groups during a step; all have the same rule
    )
    rule: UpdateRule = group["rule"]
    state = optimizer.state[parameter]
    if rule.counts_steps and "step" not in state:
        # The counter of a fused kernel is on the device, else on the CPU.
        state["step"] = torch.zeros((), device=parameter.device if group.get("fused") else "cpu")
    for name in rule.moments:
        if name not in state:
            state[name] = torch.zeros_like(parameter, requires_grad=False)
    return {name: state[name] for name in rule.moments}
