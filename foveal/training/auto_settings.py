"""Decide the settings of the engine that are ``auto`` before it is built: by the run's newest checkpoint, else by device."""

import logging
from dataclasses import replace
from typing import Any

from foveal.checkpoint.state import read_rounding
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.world import World
from foveal.engines.attention import choose_max_explicit_tokens
from foveal.engines.compiling import CompiledParts, choose_compiled_parts, explain_no_compiler
from foveal.engines.config import EngineConfig
from foveal.training.plan import Plan, PlanT

_COMPILE, _ATTENTION = "engine.compile", "engine.max_explicit_attention_tokens"
_NAMES: dict[CompiledParts, str] = {"blocks": "each transformer block", True: "the whole model"}
_log = logging.getLogger(__name__)


def decide_auto_settings(plan: PlanT, store: CheckpointStore, world: World) -> PlanT:
    """Return the plan with what ``auto`` means for this run in the settings that change rounding. Every rank calls it.

    A run that goes on, and a fork, compute as they were trained, so that no curve moves in its last bits at a resume.
    The decisions are stored in every checkpoint of the run; stated values stay.
    """
    engine = plan.cfg.engine
    is_auto = "auto" in (engine.compile, engine.max_explicit_attention_tokens)
    if not is_auto or not plan.has_checkpoints:  # a run of runs decides in each of them; probes compute as auto stands
        return plan
    rounding = _read_rounding(plan, store, world)
    decided = {
        "compile": _decide_compile(engine, rounding, world),
        "max_explicit_attention_tokens": _decide_attention(engine, rounding, world),
    }
    return replace(plan, cfg=plan.cfg.model_copy(update={"engine": engine.model_copy(update=decided)}))


def _decide_compile(engine: EngineConfig, rounding: dict[str, Any] | None, world: World) -> CompiledParts:
    """Return what is compiled; nothing where a rank cannot compile."""
    if engine.compile != "auto":
        return engine.compile
    # Versions that stored no such setting had false as default, and this run states no other.
    parts: CompiledParts = (
        choose_compiled_parts(engine, world.device.type) if rounding is None else rounding.get(_COMPILE, False)
    )
    if parts and not _can_compile(world):
        return False
    if parts:
        _log.info(
            "%s=auto: %s, %s", _COMPILE, _NAMES[parts], "for a new run" if rounding is None else "as trained before"
        )
    return parts


def _decide_attention(engine: EngineConfig, rounding: dict[str, Any] | None, world: World) -> int:
    """Return up to how many tokens attention is explicit. A run that began with the fused kernel keeps it.

    Versions that stored no such setting had the fused kernel. A run that goes on where explicit products are slow gives
    them up, and a warning says so (``warn_if_rounding_changed``).
    """
    if engine.max_explicit_attention_tokens != "auto":
        return engine.max_explicit_attention_tokens
    trained = None if rounding is None else rounding.get(_ATTENTION, 0)
    if trained == 0:
        return 0
    chosen = world.on_rank0(lambda: choose_max_explicit_tokens(engine, world.device.type))
    tokens = chosen if trained is None else min(trained, chosen)
    if tokens:
        _log.info("%s=auto: %d, %s", _ATTENTION, tokens, "for a new run" if trained is None else "as trained before")
    return tokens


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
        _log.warning("%s=auto compiles nothing, because torch.compile does not work here (%s)", _COMPILE, obstacle)
    return not world.any_rank(obstacle is not None)
