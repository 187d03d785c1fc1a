"""The command line of a stage, ``CONFIG [key=value ...] [--check] [--ranks N]``, its error messages and exit codes."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from foveal.distributed.launcher import LaunchEnv, read_launch_env
from foveal.errors import (
    AttemptSupersededError,
    ConfigError,
    FovealError,
    LaunchError,
    OutOfMemoryError,
    TrainingHungError,
)
from foveal.redact import RedactingFormatter, redact_tracebacks
from foveal.training.config import resolve_config_path
from foveal.training.stage import ConfigT, Stage


def load_config(config_class: type[ConfigT], stage_name: str, name_or_path: str, overrides: Sequence[str]) -> ConfigT:
    """Load the settings of a stage from a YAML file, given by path or by its name in configs/<stage>/.

    ``run.dir`` defaults to runs/<name of the file>. Raises: ConfigError.
    """
    file = resolve_config_path(stage_name, name_or_path)
    cfg = config_class.load(file, overrides)
    if cfg.run.dir is not None:
        return cfg
    return config_class.load(file, [*overrides, f"run.dir=runs/{file.stem}"])


def main(stage: Stage[Any, Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a stage and exit: 0 if finished, preempted or finished before; else an error message and its exit code.

    Exit codes: see ``foveal.errors``.
    """
    options = _parse_args(stage, argv)
    _configure_logging()
    try:
        if options.ranks is not None and options.ranks < 1:
            raise ConfigError(f"--ranks={options.ranks}: a run has one rank or more")
        if options.config is None:
            options.config, options.overrides = _resolve_default_args(stage, options.overrides)
        cfg = load_config(stage.config_class, stage.name, options.config, options.overrides)
        functions = stage.functions  # imports torch and timm: after the settings, and before ranks wait for each other
        if options.check:
            plan = functions.build_plan(cfg, options.ranks or read_launch_env().world_size)
            sys.stdout.write("\n".join(plan.summary_lines()) + "\n")
            sys.exit(0)
        from foveal.training.launch import join_and_run

        if join_and_run(stage, cfg) > 1:
            _exit_process(0)
    except (TrainingHungError, OutOfMemoryError) as error:
        _print_error(error)
        _exit_process(error.exit_code)
    except FovealError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        from foveal.distributed.peer_failure import describe_peer_failure
        from foveal.training.out_of_memory import diagnose_out_of_memory

        if (out_of_memory := diagnose_out_of_memory(error, stage.name)) is not None:
            _print_error(out_of_memory)
            _exit_process(out_of_memory.exit_code)
        if (peer_failure := describe_peer_failure(error)) is None:
            raise
        _print_error(TrainingHungError(peer_failure))
        _exit_process(TrainingHungError.exit_code)
    sys.exit(0)


def _exit_process(code: int) -> NoReturn:
    """Exit without the interpreter's finalization, which sometimes aborts (code 134) after gloo's threads have run."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _resolve_default_args(stage: Stage[Any, Any], overrides: list[str]) -> tuple[str, list[str]]:
    if stage.prepare_default_args is None:
        raise ConfigError(f"CONFIG is missing: give a YAML file, or the name of one in configs/{stage.name}/")
    config, *prepared = stage.prepare_default_args()
    return config, prepared + overrides


def _print_error(error: FovealError) -> None:
    """Print an error to stderr, on one rank per node unless the error can be specific to a rank."""
    try:
        launch_env = read_launch_env()
    except LaunchError:  # the launch environment itself is the error
        launch_env = LaunchEnv(0, 1, 0, "none")
    if launch_env.local_rank == 0 or isinstance(
        error, LaunchError | AttemptSupersededError | TrainingHungError | OutOfMemoryError
    ):
        rank = f" (rank {launch_env.rank} of {launch_env.world_size})" if launch_env.rank else ""
        sys.stderr.write(f"foveal: {error}{rank}\n")


def _parse_args(stage: Stage[Any, Any], argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{stage.name}.run", description=f"foveal's {stage.name} stage. Settings: docs/configuration.md."
    )
    parser.add_argument(
        "config", nargs="?", default=None, help=f"a YAML file, or the name of one in configs/{stage.name}/"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted.key=value")
    parser.add_argument("--check", action="store_true", help="validate, print the plan, exit")
    parser.add_argument("--ranks", type=int, help="with --check: the number of ranks to plan for")
    # deepspeed and torch's old launcher also pass the local rank as an argument; foveal reads it from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(argv)
    if options.config is not None and "=" in options.config:  # no CONFIG, overrides only
        options.overrides.insert(0, options.config)
        options.config = None
    return options


def _configure_logging() -> None:
    """Send foveal's log to stderr, and from other libraries only warnings that a user can act on."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    redact_tracebacks()
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("foveal").setLevel(logging.INFO)
    for library in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
