"""The command line of a stage: ``CONFIG [key=value ...] [--check] [--ranks N]``, and what a mistake looks like."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from foveal.distributed.preemption import listening, requeue
from foveal.distributed.world import World, joined, seat
from foveal.errors import ConfigError, FovealError, LaunchError
from foveal.runtime import Run, opened
from foveal.stage import Plan, StageConfig, config_file

C = TypeVar("C", bound=StageConfig)
P = TypeVar("P", bound=Plan)
_log = logging.getLogger("foveal")


@dataclass(frozen=True)
class Stage(Generic[C, P]):
    """A stage: its settings, how they become a plan on so many ranks, and what is done with the plan.

    ``default`` gives the command line of a start without CONFIG, and prepares what that needs.
    """

    name: str
    config: type[C]
    plan: Callable[[C, int], P]
    train: Callable[[P, Run], None]
    default: Callable[[], list[str]] | None = None


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
    """Run a stage and exit: 0 done, left or finished already; 2 and one sentence for a user's mistake."""
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
        with joined(cfg.engine.timeout_minutes * 60) as world:
            world.barrier()  # rank 0 may still prepare what a default needs
            if world.rank:
                logging.getLogger().handlers[0].setLevel(logging.ERROR)  # the others speak in their own logs
            enter(stage, cfg, world)
    except FovealError as error:
        _say(error)
        sys.exit(error.exit_code)
    sys.exit(0)


def _default(stage: Stage[Any, Any], overrides: list[str]) -> tuple[str, list[str]]:
    if stage.default is None:
        raise ConfigError(f"CONFIG is missing: give a YAML file, or the name of one in configs/{stage.name}/")
    config, *prepared = stage.default()
    return config, prepared + overrides


def enter(stage: Stage[Any, Any], cfg: StageConfig, world: World) -> None:
    """Run a stage among the ranks of a world, and ask Slurm for another start if it was told to leave."""
    plan = stage.plan(cfg, world.size)
    with listening(world) as preemption:
        with opened(stage.name, plan, world, preemption) as run:
            if run is None:
                return
            for line in run.plan.lines():
                _log.info(line)
            stage.train(run.plan, run)
        if run.left and world.rank == 0 and preemption.heard != "SIGINT" and (refusal := requeue()):
            raise LaunchError(f"the run was saved, but Slurm did not requeue the job ({refusal}); submit it again")


def _say(error: FovealError) -> None:
    """One sentence, from one rank of each node: every rank of a node makes the same mistake."""
    here = seat()
    if here.local == 0 or isinstance(error, LaunchError):
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
    options = parser.parse_intermixed_args(argv)
    if options.config is not None and "=" in options.config:  # no CONFIG, overrides only
        options.overrides.insert(0, options.config)
        options.config = None
    return options


def _speak_plainly() -> None:
    """Our log on stderr; of other libraries, warnings that a user can act on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("foveal").setLevel(logging.INFO)
    for noisy in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
