"""``python -m foveal.commands.summary runs/demo [--since SECONDS]``: what came of a pipeline, as one short table."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from foveal.atomic import read_json
from foveal.errors import CheckpointError, FovealError


def read_finished_runs(pipeline_dir: Path) -> dict[str, dict[str, Any]]:
    """Each stage's finished.json, by the name of its run, in the order in which they finished.

    Raises: CheckpointError where there is none, or where a run has begun and is not finished.
    """
    begun = sorted(file.parent for file in pipeline_dir.glob("*/science.json"))
    if not begun:
        raise CheckpointError(f"{pipeline_dir} holds no runs")
    open_ends = [str(run) for run in begun if not (run / "finished.json").exists()]
    if open_ends:
        raise CheckpointError(f"{', '.join(open_ends)} not finished; start the pipeline again and it continues")
    files = sorted((run / "finished.json" for run in begun), key=lambda file: file.stat().st_mtime)
    return {file.parent.name: read_json(file) for file in files}


def _build_stages_table(runs: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="stages", title_justify="left")
    for name in ("run", "steps", "loss", "images/s", "training"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, facts in runs.items():
        numbers = facts["summary"]
        loss, pace = numbers.get("loss"), numbers.get("images_per_second")
        table.add_row(
            name,
            f"{numbers['step']:.0f}" if "step" in numbers else "trials" if "trials.repeats" in facts["science"] else "",
            f"{loss:.4f}" if loss is not None else "",
            f"{pace:,.0f}" if pace is not None else "",
            f"{facts['seconds']:.0f} s",
        )
    return table


def _build_trials_tables(runs: dict[str, dict[str, Any]]) -> list[Table]:
    """A table for each comparison of ways to start."""
    tables = []
    for name, facts in runs.items():
        numbers, science = facts["summary"], facts["science"]
        arms = [key.removesuffix("_top1_lowest") for key in numbers if key.endswith("_top1_lowest")]
        if not arms:
            continue
        per_class, repeats = science["data.per_class"], science["trials.repeats"]
        labels = f"{per_class} labels a class" if per_class else "all labels"
        table = Table(title=f"{name}: {labels}, {repeats} seeds, each arm's own best rate", title_justify="left")
        for column in ("start", "top-1", "lowest to highest", "lr per 256"):
            table.add_column(column, justify="left" if column == "start" else "right")
        for arm in arms:
            spread = f"{numbers[f'{arm}_top1_lowest']:.3f} to {numbers[f'{arm}_top1_highest']:.3f}"
            table.add_row(arm, f"{numbers[f'{arm}_top1']:.3f}", spread, f"{numbers[f'{arm}_lr_per_256']:g}")
        tables.append(table)
    return tables


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="foveal.commands.summary", description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--since", type=float, help="seconds since the epoch at which the command began")
    options = parser.parse_args()
    console = Console(highlight=False)
    try:
        runs = read_finished_runs(options.pipeline)
    except FovealError as error:
        sys.stderr.write(f"foveal: {error}\n")
        sys.exit(error.exit_code)
    for table in (_build_stages_table(runs), *_build_trials_tables(runs)):
        console.print(table)
    pictures = sorted({str(file.parent) for file in options.pipeline.glob("*/pictures/*.png")})
    console.print(f"pictures  {', '.join(pictures)}")
    console.print(f"MLflow    {options.pipeline.parent / 'mlflow.db'} (make ui opens it)")
    if options.since:
        minutes, seconds = divmod(round(time.time() - options.since), 60)
        console.print(f"took      {minutes} min {seconds} s")


if __name__ == "__main__":
    main()
