"""The command line of a stage, ``CONFIG [key=value ...] [--check] [--ranks N]``, its error messages and exit codes."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
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

_log = logging.getLogger("foveal")


def load_config(
    config_class: type[ConfigT],
    stage_name: str,
    name_or_path: str,
    overrides: Sequence[str],
    on_warning: Callable[[str], None] = _log.warning,
) -> ConfigT:
    """Load the settings of a stage from a YAML file, given by path or by its name in configs/<stage>/.

    ``run.dir`` defaults to runs/<name of the file>; ``on_warning`` gets a text about names of 0.1. Raises: ConfigError.
    """
    file = resolve_config_path(stage_name, name_or_path)
    cfg = config_class.load(file, overrides, on_warning)
    if cfg.run.dir is not None:
        return cfg
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": f"runs/{file.stem}"})})


def main(stage: Stage[Any, Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a stage and exit: 0 if finished, preempted or finished before; else an error message and its exit code.

    Exit codes: see ``foveal.errors``.
    """
    options = _parse_args(stage, argv)
    _configure_logging()
    exit_code, skips_finalization = 0, False
    try:
        if options.ranks is not None and options.ranks < 1:
            raise ConfigError(f"--ranks={options.ranks}: a run has one rank or more")
        if options.config is None:
            options.config, options.overrides = _resolve_default_args(stage, options.overrides)
        cfg = load_config(stage.config_class, stage.name, options.config, options.overrides, _warn_on_rank0)
        functions = stage.functions  # imports torch and timm: after the settings, and before ranks wait for each other
        if options.check:
            from foveal.training.run_directory import preview_fork

            plan = preview_fork(functions.build_plan(cfg, options.ranks or read_launch_env().world_size))
            sys.stdout.write("\n".join(plan.summary_lines()) + "\n")
            sys.exit(0)
        from foveal.training.launch import join_and_run

        launch_env = read_launch_env()
        skips_finalization = launch_env.world_size > 1
        join_and_run(stage, cfg, launch_env)
    except Exception as error:
        known_error = error if isinstance(error, FovealError) else _diagnose(error, stage.name)
        if known_error is not None:
            _print_error(known_error)
            exit_code = known_error.exit_code
            skips_finalization |= isinstance(known_error, TrainingHungError | OutOfMemoryError)
        elif skips_finalization:
            sys.excepthook(type(error), error, error.__traceback__)
            exit_code = 1
        else:
            raise
    if skips_finalization:
        _exit_process(exit_code)
    sys.exit(exit_code)


def _diagnose(error: Exception, stage_name: str) -> FovealError | None:
    """Return OutOfMemoryError or TrainingHungError for a library's error that means it; None for any other."""
    from foveal.distributed.peer_failure import describe_peer_failure
    from foveal.training.out_of_memory import diagnose_out_of_memory

    if (out_of_memory := diagnose_out_of_memory(error, stage_name)) is not None:
        return out_of_memory
    peer_failure = describe_peer_failure(error)
    return TrainingHungError(peer_failure) if peer_failure is not None else None


def _warn_on_rank0(text: str) -> None:
    """Log a warning on one rank; on every rank whose launch environment is wrong, which is an error later."""
    try:
        rank = read_launch_env().rank
    except LaunchError:
        rank = 0
    if rank == 0:
        _log.warning(text)


def _exit_process(code: int) -> NoReturn:
    """Exit without the interpreter's finalization, which sometimes aborts (code 134) after gloo's threads have run."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it
            stream.flush()
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
