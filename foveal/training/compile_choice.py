"""Decide ``engine.compile=auto`` before a run's engine is built: by its newest checkpoint, else by device and engine."""

import logging
from dataclasses import replace
from typing import Any

from foveal.checkpoint.state import read_rounding
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.world import World
from foveal.engines.compiling import CompiledParts, choose_compiled_parts, explain_no_compiler
from foveal.training.plan import Plan, PlanT

_SETTING = "engine.compile"
_NAMES: dict[CompiledParts, str] = {"blocks": "each transformer block", True: "the whole model"}
_log = logging.getLogger(__name__)


def decide_compile(plan: PlanT, store: CheckpointStore, world: World) -> PlanT:
    """Return the plan with what ``engine.compile=auto`` means for this run; a stated value stays. Every rank calls it.

    A run that goes on, and a fork, compile what they were trained with, so that no curve moves in its last bits at a
    resume. Where a rank cannot compile, nothing is compiled. The decision is stored in every checkpoint of the run.
    """
    engine = plan.cfg.engine
    if engine.compile != "auto" or not plan.has_checkpoints:  # a run that consists of runs decides in each of them
        return plan
    rounding = _read_rounding(plan, store, world)
    # Versions that stored no such setting had false as default, and this run states no other.
    parts: CompiledParts = (
        choose_compiled_parts(engine, world.device.type) if rounding is None else rounding.get(_SETTING, False)
    )
    if parts and not _can_compile(world):
        parts = False
    elif parts:
        _log.info(
            "%s=auto: %s, %s", _SETTING, _NAMES[parts], "for a new run" if rounding is None else "as trained before"
        )
    engine = engine.model_copy(update={"compile": parts})
    return replace(plan, cfg=plan.cfg.model_copy(update={"engine": engine}))


def _read_rounding(plan: Plan, store: CheckpointStore, world: World) -> dict[str, Any] | None:
    """Return the rounding settings of the checkpoint that a run begins in, perhaps its source's; None for a new run."""
    rounding = store.read_newest_rounding()
    source = plan.fork.checkpoint if plan.fork is not None else None
    if rounding is not None or source is None:
        return rounding
    return world.on_rank0(lambda: read_rounding(source))


def _can_compile(world: World) -> bool:
    """Return whether torch.compile works on every rank; each rank logs what it lacks."""
    obstacle = explain_no_compiler(world.device)
    if obstacle is not None:
        _log.warning("%s=auto compiles nothing, because torch.compile does not work here (%s)", _SETTING, obstacle)
    return not world.any_rank(obstacle is not None)
