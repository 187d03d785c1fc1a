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

from foveal.distributed.gpu_allocation import check_slurm_gpus
from foveal.distributed.launcher import LaunchEnv, read_launch_env
from foveal.distributed.peer_failure import describe_peer_failure
from foveal.distributed.preemption import Preemption, handle_stop_signals, ignore_signals
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.world import World, init_world
from foveal.errors import (
    AttemptSupersededError,
    ConfigError,
    FovealError,
    LaunchError,
    OutOfMemoryError,
    TrainingHungError,
)
from foveal.redact import RedactingFormatter, redact_tracebacks
from foveal.training.loop import TrainingSetup
from foveal.training.out_of_memory import diagnose_out_of_memory
from foveal.training.plan import Plan, StageConfig, resolve_config_path
from foveal.training.run import Run
from foveal.training.run_directory import open_run

ConfigT = TypeVar("ConfigT", bound=StageConfig)
PlanT = TypeVar("PlanT", bound=Plan)
_log = logging.getLogger("foveal")


@dataclass(frozen=True)
class Stage(Generic[ConfigT, PlanT]):
    """A stage: its settings, how they become a plan on so many ranks, and what is done with the plan.

    ``parts`` builds what a step of the plan is made of, a frozen teacher on the device; ``foveal plan`` builds the same
    without memory for it. ``default`` gives the command line of a start without CONFIG, and prepares what that needs.
    ``divide`` makes runs of a config, each by a call that says whether the run is finished; by itself a config is one.
    """

    name: str
    config_class: type[ConfigT]
    build_plan: Callable[[ConfigT, int], PlanT]
    train: Callable[[PlanT, Run], None]
    build: Callable[[PlanT, torch.device], TrainingSetup[Any]]
    prepare_default_args: Callable[[], list[str]] | None = None
    dispatch_runs: Callable[[ConfigT, World, Callable[[ConfigT], bool]], None] | None = None


def load_config(config_class: type[ConfigT], stage_name: str, name_or_path: str, overrides: Sequence[str]) -> ConfigT:
    """The settings of a stage from a YAML file, or from the name of one in configs/<stage>/.

    ``run.dir`` defaults to runs/<name of the file>. Raises: ConfigError.
    """
    file = resolve_config_path(stage_name, name_or_path)
    cfg = config_class.load(file, overrides)
    if cfg.run.dir is not None:
        return cfg
    return config_class.load(file, [*overrides, f"run.dir=runs/{file.stem}"])


def main(stage: Stage[Any, Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a stage and exit: 0 done, left or finished already; else a sentence and a code of ``foveal.errors``."""
    options = _parse_args(stage, argv)
    _configure_logging()
    try:
        if options.ranks is not None and options.ranks < 1:
            raise ConfigError(f"--ranks={options.ranks}: a run has one rank or more")
        if options.config is None:
            options.config, options.overrides = _resolve_default_args(stage, options.overrides)
        cfg = load_config(stage.config_class, stage.name, options.config, options.overrides)
        if options.check:
            plan = stage.build_plan(cfg, options.ranks or read_launch_env().world_size)
            sys.stdout.write("\n".join(plan.lines()) + "\n")
            sys.exit(0)
        here = read_launch_env()
        if (idle := check_slurm_gpus(here)) and here.local_rank == 0:
            _log.warning(idle)
        run = RunIdentity.from_launch_env(here, stage.name, cfg, cfg.run.dir)
        with init_world(cfg.engine.timeout_minutes * 60, run) as world:
            world.barrier()  # rank 0 may still prepare what a default needs
            if world.rank:
                logging.getLogger().handlers[0].setLevel(logging.ERROR)  # the others speak in their own logs
            run_stage(stage, cfg, world)
            ignore_signals()  # all is said and done: a signal that comes now must not make a failure of it
        if world.size > 1:
            _exit_process(0)
    except (TrainingHungError, OutOfMemoryError) as error:
        _print_error(error)
        _exit_process(error.exit_code)
    except FovealError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if (memory := diagnose_out_of_memory(error, stage.name)) is not None:
            _print_error(memory)
            _exit_process(memory.exit_code)
        if (sentence := describe_peer_failure(error)) is None:
            raise
        _print_error(TrainingHungError(sentence))
        _exit_process(TrainingHungError.exit_code)
    sys.exit(0)


def _exit_process(code: int) -> NoReturn:
    """Leave without the interpreter's own clearing up, which aborts now and then (code 134) where gloo's threads were."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _resolve_default_args(stage: Stage[Any, Any], overrides: list[str]) -> tuple[str, list[str]]:
    if stage.prepare_default_args is None:
        raise ConfigError(f"CONFIG is missing: give a YAML file, or the name of one in configs/{stage.name}/")
    config, *prepared = stage.prepare_default_args()
    return config, prepared + overrides


def run_stage(stage: Stage[Any, Any], cfg: StageConfig, world: World) -> None:
    """Run a stage among the ranks of a world."""
    with handle_stop_signals(world) as preemption:
        if stage.dispatch_runs is None:
            _execute_run(stage, world, preemption, cfg)
        else:
            stage.dispatch_runs(cfg, world, partial(_execute_run, stage, world, preemption))


def _execute_run(stage: Stage[Any, Any], world: World, preemption: Preemption, cfg: StageConfig) -> bool:
    """One run of a stage; whether it is finished, now or since before.

    Raises: RankConflict where what decides a result is another on another rank: the data that its node sees, say.
    """
    plan = world.run_all_or_raise(lambda: stage.build_plan(cfg, world.size))
    world.check_equal_on_ranks({"run.dir": cfg.run.dir, **plan.science_settings()})
    with open_run(stage.name, plan, world, preemption) as run:
        if run is None:
            return True
        for line in run.plan.summary_lines():
            _log.info(line)
        stage.train(run.plan, run)
    return run.is_finished


def _print_error(error: FovealError) -> None:
    """One sentence, from one rank of each node: every rank of a node makes the same mistake."""
    try:
        here = read_launch_env()
    except LaunchError:  # who this is, is what is wrong
        here = LaunchEnv(0, 1, 0, "none")
    if here.local_rank == 0 or isinstance(
        error, LaunchError | AttemptSupersededError | TrainingHungError | OutOfMemoryError
    ):
        where = f" (rank {here.rank} of {here.world_size})" if here.rank else ""
        sys.stderr.write(f"foveal: {error}{where}\n")


def _parse_args(stage: Stage[Any, Any], argv: Sequence[str] | None) -> argparse.Namespace:
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


def _configure_logging() -> None:
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
