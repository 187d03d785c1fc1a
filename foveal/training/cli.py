"""The command line of a stage: ``CONFIG [key=value ...] [--check] [--ranks N]``, and what a mistake looks like."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import torch

from foveal.distributed.gpu_allocation import check_gpus
from foveal.distributed.launcher import Seat, seat
from foveal.distributed.peer_failure import lost_peer
from foveal.distributed.preemption import Preemption, deaf, listening
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.world import World, joined
from foveal.errors import ConfigError, FovealError, Hung, LaunchError, OutOfMemory, Superseded
from foveal.redact import RedactingFormatter, redact_tracebacks
from foveal.training.loop import Parts
from foveal.training.out_of_memory import out_of_memory
from foveal.training.plan import Plan, StageConfig, config_file
from foveal.training.run import Run
from foveal.training.run_directory import opened

C = TypeVar("C", bound=StageConfig)
P = TypeVar("P", bound=Plan)
_log = logging.getLogger("foveal")


@dataclass(frozen=True)
class Stage(Generic[C, P]):
    """A stage: its settings, how they become a plan on so many ranks, and what is done with the plan.

    ``parts`` builds what a step of the plan is made of, a frozen teacher on the device; ``foveal plan`` builds the same
    without memory for it. ``default`` gives the command line of a start without CONFIG, and prepares what that needs.
    ``divide`` makes runs of a config, each by a call that says whether the run is finished; by itself a config is one.
    """

    name: str
    config: type[C]
    plan: Callable[[C, int], P]
    train: Callable[[P, Run], None]
    parts: Callable[[P, torch.device], Parts[Any]]
    default: Callable[[], list[str]] | None = None
    divide: Callable[[C, World, Callable[[C], bool]], None] | None = None


def load(config: type[C], stage: str, given: str, overrides: Sequence[str]) -> C:
    """The settings of a stage from a YAML file, or from the name of one in configs/<stage>/.

    ``run.dir`` defaults to runs/<name of the file>. Errors: ConfigError.
    """
    file = config_file(stage, given)
    cfg = config.load(file, overrides)
    if cfg.run.dir is not None:
        return cfg
    return config.load(file, [*overrides, f"run.dir=runs/{file.stem}"])


def main(stage: Stage[Any, Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a stage and exit: 0 done, left or finished already; else a sentence and a code of ``foveal.errors``."""
    options = _parse(stage, argv)
    _speak_plainly()
    try:
        if options.ranks is not None and options.ranks < 1:
            raise ConfigError(f"--ranks={options.ranks}: a run has one rank or more")
        if options.config is None:
            options.config, options.overrides = _default(stage, options.overrides)
        cfg = load(stage.config, stage.name, options.config, options.overrides)
        if options.check:
            plan = stage.plan(cfg, options.ranks or seat().size)
            sys.stdout.write("\n".join(plan.lines()) + "\n")
            sys.exit(0)
        here = seat()
        if (idle := check_gpus(here)) and here.local == 0:
            _log.warning(idle)
        run = RunIdentity.of(here, stage.name, cfg, cfg.run.dir)
        with joined(cfg.engine.timeout_minutes * 60, run) as world:
            world.barrier()  # rank 0 may still prepare what a default needs
            if world.rank:
                logging.getLogger().handlers[0].setLevel(logging.ERROR)  # the others speak in their own logs
            enter(stage, cfg, world)
            deaf()  # all is said and done: a signal that comes now must not make a failure of it
        if world.size > 1:
            _end_now(0)
    except (Hung, OutOfMemory) as error:
        _say(error)
        _end_now(error.exit_code)
    except FovealError as error:
        _say(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if (memory := out_of_memory(error, stage.name)) is not None:
            _say(memory)
            _end_now(memory.exit_code)
        if (sentence := lost_peer(error)) is None:
            raise
        _say(Hung(sentence))
        _end_now(Hung.exit_code)
    sys.exit(0)


def _end_now(code: int) -> NoReturn:
    """Leave without the interpreter's own clearing up, which aborts now and then (code 134) where gloo's threads were."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _default(stage: Stage[Any, Any], overrides: list[str]) -> tuple[str, list[str]]:
    if stage.default is None:
        raise ConfigError(f"CONFIG is missing: give a YAML file, or the name of one in configs/{stage.name}/")
    config, *prepared = stage.default()
    return config, prepared + overrides


def enter(stage: Stage[Any, Any], cfg: StageConfig, world: World) -> None:
    """Run a stage among the ranks of a world."""
    with listening(world) as preemption:
        if stage.divide is None:
            _run(stage, world, preemption, cfg)
        else:
            stage.divide(cfg, world, partial(_run, stage, world, preemption))


def _run(stage: Stage[Any, Any], world: World, preemption: Preemption, cfg: StageConfig) -> bool:
    """One run of a stage; whether it is finished, now or since before.

    Errors: RankConflict where what decides a result is another on another rank: the data that its node sees, say.
    """
    plan = world.together(lambda: stage.plan(cfg, world.size))
    world.agree({"run.dir": cfg.run.dir, **plan.science()})
    with opened(stage.name, plan, world, preemption) as run:
        if run is None:
            return True
        for line in run.plan.lines():
            _log.info(line)
        stage.train(run.plan, run)
    return run.finished


def _say(error: FovealError) -> None:
    """One sentence, from one rank of each node: every rank of a node makes the same mistake."""
    try:
        here = seat()
    except LaunchError:  # who this is, is what is wrong
        here = Seat(0, 1, 0, "none")
    if here.local == 0 or isinstance(error, LaunchError | Superseded | Hung | OutOfMemory):
        where = f" (rank {here.rank} of {here.size})" if here.rank else ""
        sys.stderr.write(f"foveal: {error}{where}\n")


def _parse(stage: Stage[Any, Any], argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{stage.name}.run", description=f"foveal's {stage.name} stage. Settings: docs/configuration.md."
    )
    parser.add_argument(
        "config", nargs="?", default=None, help=f"a YAML file, or the name of one in configs/{stage.name}/"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted.key=value")
    parser.add_argument("--check", action="store_true", help="validate, print the plan, exit")
    parser.add_argument("--ranks", type=int, help="with --check: plan for so many ranks")
    # deepspeed and torch's old launcher give every rank its number also as an argument; the environment has it.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(argv)
    if options.config is not None and "=" in options.config:  # no CONFIG, overrides only
        options.overrides.insert(0, options.config)
        options.config = None
    return options


def _speak_plainly() -> None:
    """Our log on stderr; of other libraries, warnings that a user can act on."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    redact_tracebacks()
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("foveal").setLevel(logging.INFO)
    for noisy in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
