"""``foveal train STAGE CONFIG [key=value ...]``: the command line of a stage, as ``python -m STAGE.run``."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from foveal.distributed.launcher import read_launch_env
from foveal.distributed.local_launch import run_local_ranks
from foveal.errors import ConfigError
from foveal.setting_names import format_alternatives
from foveal.training.config_files import find_config
from foveal.training.stage import STAGE_NAMES, import_stage

_MOST_PROCESSES = 1024
_USAGE = f"foveal train {'|'.join(STAGE_NAMES)} CONFIG [key=value ...]", "[--processes N] [--check]"
_HELP = f"""\
usage: {_USAGE[0]}
       {_USAGE[1]}

Train. As python -m STAGE.run, alone, under a launcher, or under srun:

  foveal train pretrain digits                                     one process
  foveal train pretrain digits --processes 2                       one per GPU
  torchrun --nproc-per-node=2 -m foveal.cli train pretrain digits  as torchrun
  accelerate launch -m foveal.cli train finetune digits            as Accelerate

stages (foveal train STAGE --help shows settings and configs of each):
  pretrain  an encoder by masked autoencoding, without labels
  distill   a student from a teacher's export
  finetune  a classifier, segmenter or detector, from an export or from scratch
"""


def train_command(context: typer.Context) -> None:
    """Pretrain, distil or fine-tune: foveal train STAGE CONFIG."""
    train(context.args)


def train(arguments: Sequence[str]) -> NoReturn:
    """Run the stage that the first argument names with the other arguments, and exit with its code.

    ``--processes N`` starts N ranks on this machine.
    Raises: ConfigError for a stage that does not exist, or a number of processes that cannot be started.
    """
    stage_name, *others = arguments or ["--help"]
    if stage_name in {"-h", "--help"}:
        sys.stdout.write(_HELP)
        sys.exit(0)
    if stage_name not in STAGE_NAMES:
        raise ConfigError(_explain_no_stage(stage_name, others))
    num_processes, others = _take_processes(others)
    if num_processes is not None and "--check" not in others:
        sys.exit(run_local_ranks(["-m", "foveal.cli", "train", stage_name, *others], num_processes))
    from foveal.training.cli import main

    ranks = [] if num_processes is None else [f"--ranks={num_processes}"]
    main(import_stage(stage_name), [*others, *ranks], prog=f"foveal train {stage_name}")


def _take_processes(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return the number that ``--processes`` states, None without it, and the other arguments. Raises: ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--processes")
    try:
        options, others = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"--processes: {error.message}") from None
    if options.processes is None:
        return None, others
    if not options.processes.isdecimal() or not 1 <= int(options.processes) <= _MOST_PROCESSES:
        raise ConfigError(
            f"--processes={options.processes}: the number of processes on this machine, 1 to {_MOST_PROCESSES}, "
            f"is expected"
        )
    if read_launch_env().world_size > 1:
        raise ConfigError("--processes and a launcher (torchrun, accelerate, srun) exclude each other: leave out one")
    return int(options.processes), others


def _explain_no_stage(word: str, others: Sequence[str]) -> str:
    """Return what to type in place of a first argument that is no stage: a typo of one, or a config without its stage."""
    if near := difflib.get_close_matches(word, STAGE_NAMES, n=1):
        return f"there is no stage '{word}'. {format_alternatives(near)}"
    if stages := [stage for stage in STAGE_NAMES if "=" not in word and find_config(stage, word)]:
        rest = " ".join([word, *others])
        return f"the stage is missing: type {' or '.join(f'foveal train {stage} {rest}' for stage in stages)}"
    return f"'{word}' is no stage: {' '.join(_USAGE)}"
