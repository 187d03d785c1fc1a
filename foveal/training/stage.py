"""A stage as its command line knows it; its functions, which need torch and timm, are imported at their first use."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from foveal.training.config import StageConfig

if TYPE_CHECKING:  # a command line with a wrong setting is answered without waiting for torch
    import torch

    from foveal.distributed.world import World
    from foveal.training.loop import TrainingSetup
    from foveal.training.plan import Plan
    from foveal.training.run import Run

STAGE_NAMES = ("pretrain", "distill", "finetune")
ConfigT = TypeVar("ConfigT", bound=StageConfig)
PlanT = TypeVar("PlanT", bound="Plan")


@dataclass(frozen=True)
class StageFunctions(Generic[ConfigT, PlanT]):
    """The functions of a stage.

    ``build_plan``: (config, number of ranks) to a plan. ``train``: execute a plan in an open run. ``build``: the
    training setup of a plan, with a frozen teacher on the device; ``foveal plan`` builds it on the meta device.
    ``dispatch_runs``: split a config into runs and pass each run's config to the callback, which returns whether the
    run is finished; None: a config is one run.
    """

    build_plan: "Callable[[ConfigT, int], PlanT]"
    train: "Callable[[PlanT, Run], None]"
    build: "Callable[[PlanT, torch.device], TrainingSetup[Any]]"
    dispatch_runs: "Callable[[ConfigT, World, Callable[[ConfigT], bool]], None] | None" = None


@dataclass(frozen=True)
class Stage(Generic[ConfigT, PlanT]):
    """A stage's name and settings, and the import of its functions.

    ``prepare_default_args``: return the command line of a start without CONFIG, after preparing its inputs.
    ``examples``: commands that --help shows.
    """

    name: str
    config_class: type[ConfigT]
    import_functions: Callable[[], StageFunctions[ConfigT, PlanT]]
    prepare_default_args: Callable[[], list[str]] | None = None
    examples: tuple[str, ...] = ()

    @cached_property
    def functions(self) -> StageFunctions[ConfigT, PlanT]:
        """The functions; the first access imports torch and timm."""
        return self.import_functions()


def import_stage(name: str) -> Stage[Any, Any]:
    """Return a stage by name. The import is dynamic, because stages import foveal and never the reverse."""
    return importlib.import_module(f"{name}.run").STAGE
