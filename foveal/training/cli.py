"""The command line of a stage, ``CONFIG [key=value ...] [--check] [--ranks N]``, its error messages and exit codes."""

import argparse
import difflib
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
from foveal.interrupt import INTERRUPTED, INTERRUPTED_EXIT_CODE, exit_at_once_on_interrupt, report_error
from foveal.redact import RedactingFormatter, redact_tracebacks
from foveal.setting_names import format_alternatives, is_setting
from foveal.training.config_files import SHIPPED_CONFIGS, list_configs
from foveal.training.config_mistakes import explain_wrong_file, locate_config
from foveal.training.stage import ConfigT, Stage
from foveal.training.stage_help import format_stage_help

# Their deprecation warnings are about calls inside their own code, at DeepSpeed's import and MLflow's first start.
_LIBRARIES_THAT_WARN_OF_THEMSELVES = ("accelerate", "deepspeed", "mlflow", "timm", "torch")
_log = logging.getLogger("foveal")


def load_config(
    config_class: type[ConfigT],
    stage_name: str,
    name_or_path: str,
    overrides: Sequence[str],
    on_warning: Callable[[str], None] = _log.warning,
) -> ConfigT:
    """Load the settings of a stage from a YAML file, given by path or by its name (``find_config``).

    ``run.dir`` defaults to runs/<name of the file>; ``on_warning`` gets a text about names of 0.1, and one about a file
    that is not in the working directory's configs/. Raises: ConfigError.
    """
    file = locate_config(stage_name, name_or_path)
    try:
        cfg = config_class.load(file, overrides, on_warning)
    except ConfigError:
        if no_config := explain_wrong_file(stage_name, file):
            raise ConfigError(no_config) from None
        raise
    if SHIPPED_CONFIGS in file.parents:
        on_warning(f"config: {file}, which ships with foveal")
    if cfg.run.dir is not None:
        return cfg
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": f"runs/{file.stem}"})})


def main(stage: Stage[Any, Any], argv: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Run a stage and exit: 0 if finished, preempted or finished before; else an error message and its exit code.

    ``prog``: the command as --help shows it. Exit codes: see ``foveal.errors``.
    """
    options = _parse_args(stage, argv, prog or f"python -m {stage.name}.run")
    _configure_logging()
    exit_code, skips_finalization = 0, False
    try:
        if options.ranks is not None and options.ranks < 1:
            raise ConfigError(f"--ranks={options.ranks}: a run has one rank or more")
        if options.config is None:
            options.config, options.overrides = _resolve_default_args(stage, options.overrides)
        cfg = load_config(stage.config_class, stage.name, options.config, options.overrides, _warn_on_rank0)
        with exit_at_once_on_interrupt(on_stderr=_is_first_on_node()):
            # imports torch and timm: after the settings, and before ranks wait for each other
            functions = stage.functions
            from foveal.training.launch import join_and_run
            from foveal.training.preview import preview_start
            from foveal.training.report import wrap_lines
            from foveal.training.run_directory import keep_rules_of_run
        if options.check:
            plan = functions.build_plan(keep_rules_of_run(cfg), options.ranks or read_launch_env().world_size)
            plan, start_lines = preview_start(plan, functions.build)
            sys.stdout.write("\n".join(wrap_lines([*plan.summary_lines(), *start_lines])) + "\n")
            sys.exit(0)
        launch_env = read_launch_env()
        skips_finalization = launch_env.world_size > 1
        join_and_run(stage, cfg, launch_env)
    except KeyboardInterrupt:
        report_error(INTERRUPTED, on_stderr=_is_first_on_node())
        exit_code = INTERRUPTED_EXIT_CODE
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
    """Return OutOfMemoryError, LaunchError or TrainingHungError for a library's error that means it, else None."""
    from foveal.distributed.peer_failure import describe_peer_failure, diagnose_launch_mistake
    from foveal.training.out_of_memory import diagnose_out_of_memory

    if (out_of_memory := diagnose_out_of_memory(error, stage_name)) is not None:
        return out_of_memory
    if (mistake := diagnose_launch_mistake(error)) is not None:
        return mistake
    peer_failure = describe_peer_failure(error)
    return TrainingHungError(peer_failure) if peer_failure is not None else None


def _warn_on_rank0(text: str) -> None:
    """Log a warning on one rank; on every rank whose launch environment is wrong, which is an error later."""
    if _read_launch_env_or_single().rank == 0:
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
        raise ConfigError(f"CONFIG is missing: give a YAML file, or one of {', '.join(list_configs(stage.name))}")
    config, *prepared = stage.prepare_default_args()
    return config, prepared + overrides


def _print_error(error: FovealError) -> None:
    """Print an error to stderr, on one rank per node unless the error can be specific to a rank."""
    launch_env = _read_launch_env_or_single()
    is_of_rank = isinstance(error, LaunchError | AttemptSupersededError | TrainingHungError | OutOfMemoryError)
    rank = f" (rank {launch_env.rank} of {launch_env.world_size})" if launch_env.rank else ""
    report_error(f"{error}{rank}", on_stderr=is_of_rank or launch_env.local_rank == 0)


def _is_first_on_node() -> bool:
    return _read_launch_env_or_single().local_rank == 0


def _read_launch_env_or_single() -> LaunchEnv:
    """Return the launch environment; that of a single process if it is wrong, which is an error of its own."""
    try:
        return read_launch_env()
    except LaunchError:
        return LaunchEnv(0, 1, 0, "none")


class _StageParser(argparse.ArgumentParser):
    """A parser whose --help also shows the stage's settings, configs and examples."""

    def __init__(self, stage: Stage[Any, Any], prog: str) -> None:
        description = f"{stage.config_class.__doc__ or ''}".strip().partition("\n")[0]
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self._stage = stage

    def format_help(self) -> str:
        return super().format_help() + format_stage_help(self._stage)

    def error(self, message: str) -> NoReturn:
        """Write one sentence in place of the usage, and exit with the code of a wrong setting."""
        report_error(message, on_stderr=_is_first_on_node())
        sys.exit(ConfigError.exit_code)

    def explain_unknown(self, arguments: Sequence[str]) -> str:
        """Return what to type in place of arguments that are no options, such as epochs=5 in place of --epochs 5."""
        option = next((argument for argument in arguments if argument.startswith("-")), arguments[0])
        name, _, value = option.lstrip("-").partition("=")
        explanation = f"{option} is no option of {self.prog}"
        if is_setting(self._stage.config_class, setting := name.replace("-", "_")):
            following = arguments[arguments.index(option) + 1 :]
            value = value or next((word for word in following[:1] if not word.startswith("-")), "VALUE")
            return f"{explanation}: a setting has no dashes: type {setting}={value}"
        options = ["--check", "--ranks"] + (["--processes"] if self.prog.startswith("foveal train") else [])
        if near := difflib.get_close_matches(option.partition("=")[0], options, n=1):
            return f"{explanation}. {format_alternatives(near)}"
        return f"{explanation}: there are {', '.join(options)} and --help, and settings as key=value, such as epochs=5"


def _parse_args(stage: Stage[Any, Any], argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = _StageParser(stage, prog)
    parser.add_argument(
        "config", nargs="?", default=None, metavar="CONFIG", help="a YAML file, or the name of a config (below)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a setting in place of the config's")
    parser.add_argument("--check", action="store_true", help="validate, print the plan and what a start would do, exit")
    parser.add_argument("--ranks", type=int, help="with --check: the number of ranks to plan for")
    if prog.startswith("foveal train"):  # which takes the option before this parser sees it
        parser.add_argument("--processes", metavar="N", help="start N ranks on this machine, one for each GPU")
    # deepspeed and torch's old launcher also pass the local rank as an argument; foveal reads it from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(parser.explain_unknown(unknown))
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
    for library in _LIBRARIES_THAT_WARN_OF_THEMSELVES:
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{library}(\.|$)")
    # Accelerate's, of a choice that is torch's own without the variables.
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
