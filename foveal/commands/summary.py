"""``python -m foveal.commands.summary runs/demo [--since SECONDS]``: the results of a pipeline as short tables."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from foveal.atomic import read_json
from foveal.errors import CheckpointError, FovealError


def read_completed_pipeline(pipeline_dir: Path) -> dict[str, dict[str, Any]]:
    """Return each run's finished.json by the run's name, in the order in which the runs finished.

    Raises: CheckpointError if there is no run, or a run that has not finished.
    """
    run_dirs = sorted(file.parent for file in pipeline_dir.glob("*/science.json"))
    if not run_dirs:
        raise CheckpointError(f"{pipeline_dir} holds no runs")
    unfinished = [str(run) for run in run_dirs if not (run / "finished.json").exists()]
    if unfinished:
        raise CheckpointError(f"{', '.join(unfinished)} not finished; start the pipeline again and it continues")
    files = sorted((run / "finished.json" for run in run_dirs), key=lambda file: file.stat().st_mtime)
    return {file.parent.name: read_json(file) for file in files}


def _build_stages_table(runs: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="stages", title_justify="left")
    for name in ("run", "steps", "loss", "images/s", "training"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, facts in runs.items():
        metrics = facts["summary"]
        loss, throughput = metrics.get("loss"), metrics.get("images_per_second")
        table.add_row(
            name,
            f"{metrics['step']:.0f}" if "step" in metrics else "trials" if "trials.repeats" in facts["science"] else "",
            f"{loss:.4f}" if loss is not None else "",
            f"{throughput:,.0f}" if throughput is not None else "",
            f"{facts['seconds']:.0f} s",
        )
    return table


def _build_trials_tables(runs: dict[str, dict[str, Any]]) -> list[Table]:
    """Build one table per run with ``trials``: its arms compared."""
    tables = []
    for name, facts in runs.items():
        metrics, science = facts["summary"], facts["science"]
        arms = [key.removesuffix("_top1_lowest") for key in metrics if key.endswith("_top1_lowest")]
        if not arms:
            continue
        per_class, repeats = science["data.samples_per_class"], science["trials.repeats"]
        labels = f"{per_class} labels a class" if per_class else "all labels"
        table = Table(title=f"{name}: {labels}, {repeats} seeds, each arm's own best rate", title_justify="left")
        for column in ("start", "top-1", "lowest to highest", "lr per 256"):
            table.add_column(column, justify="left" if column == "start" else "right")
        for arm in arms:
            spread = f"{metrics[f'{arm}_top1_lowest']:.3f} to {metrics[f'{arm}_top1_highest']:.3f}"
            table.add_row(arm, f"{metrics[f'{arm}_top1']:.3f}", spread, f"{metrics[f'{arm}_lr_per_256']:g}")
        tables.append(table)
    return tables


def main() -> None:
    """Print the tables of a pipeline's results."""
    parser = argparse.ArgumentParser(prog="foveal.commands.summary", description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--since", type=float, help="seconds since the epoch at which the command began")
    options = parser.parse_args()
    console = Console(highlight=False)
    try:
        runs = read_completed_pipeline(options.pipeline)
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
