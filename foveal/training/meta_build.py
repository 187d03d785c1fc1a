"""A stage's model on the meta device, where weights take no memory and loading them does nothing, and its checkpoint's size."""

import warnings
from collections.abc import Callable

import torch
from torch import nn

from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import count_moment_elements
from foveal.training.loop import TrainingSetup

META = torch.device("meta")
_FP32_BYTES = 4


def build_on_meta(build: Callable[[torch.device], TrainingSetup]) -> TrainingSetup:
    """Build a stage's setup on the meta device, without touching the generators. Raises: as the build of the stage."""
    with torch.random.fork_rng(devices=[]), META, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(META)


def count_trainable(model: nn.Module) -> int:
    """Return the number of trained elements."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_hidden_matrices(setup: TrainingSetup) -> int:
    """Return the elements of the matrices that the optimizer updates by a rule of their own."""
    groups = (group for group in setup.param_groups if group.get("hidden_matrices"))
    return sum(parameter.numel() for group in groups for parameter in group["params"])


def checkpoint_bytes(setup: TrainingSetup, optim: OptimConfig) -> int:
    """Return the size of a checkpoint: fp32 weights and moments of trained parameters, and the state's frozen tensors."""
    model, trainable = setup.model, count_trainable(setup.model)
    buffers = dict(model.named_buffers())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    saved_buffers = [buffers[name] for name in model.state_dict() if name in buffers]
    moments = count_moment_elements(optim, trainable, count_hidden_matrices(setup))
    return (trainable + moments) * _FP32_BYTES + sum(tensor.nbytes for tensor in (*frozen, *saved_buffers))
