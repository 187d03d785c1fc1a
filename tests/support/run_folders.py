"""Run directories as a training leaves them, written by hand: what reports read."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from foveal.inspect.picture import Picture, save_picture
from foveal.runs.inputs import RunInputs, write_inputs
from foveal.runs.record import PlannedRun, write_plan
from foveal.strict_yaml import dump_yaml

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1_0"

# Texts with which a page would break, or do what they say.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(2)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "line\u2028break\nand more",
    "<b>bold</b> & 'quotes' <a href=\"javascript:alert(3)\">link</a>",
    "Größe äöü 猫",
)


def write_run(
    run: Path,
    *,
    stage: str = "pretrain",
    settings: Mapping[str, Any] | None = None,
    rows: Iterable[Mapping[str, Any]] = (),
    summary: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    attempts: Sequence[Mapping[str, Any]] = ({"code": 0, "why": "finished", "step": 20, "seconds": 3.0},),
    inputs: RunInputs | None = None,
    num_runs: int = 1,
    total_steps: int = 20,
) -> Path:
    """Write a run directory. summary: of finished.json; None for a run that is not finished. attempts: their ends."""
    run.mkdir(parents=True)
    tree = {"seed": 0, "epochs": 4, "batch": {"global_size": 8}, "data": {"path": "data/digits"}} | dict(settings or {})
    (run / "config.yaml").write_text(dump_yaml(tree))
    (run / "science.json").write_text("{}")
    (run / "tags.json").write_text(json.dumps({"state": "finished" if summary is not None else "failed"}))
    with (run / "metrics.jsonl").open("w") as stream:
        stream.writelines(f"{json.dumps(row)}\n" for row in rows)
    if summary is not None:
        facts = {"summary": dict(summary), "notes": list(notes), "seconds": 2.0, "total_seconds": 3.0}
        (run / "finished.json").write_text(json.dumps(facts))
    (run / "attempts").mkdir()
    for number, end in enumerate(attempts, 1):
        holder = {"host": "node1", "pid": 1, "born": "boot pid:[1] 1", "ranks": 2, "time": 1.7e9 + number}
        (run / "attempts" / f"{number:04d}.json").write_text(json.dumps(holder))
        (run / "attempts" / f"{number:04d}.start.json").write_text(json.dumps({"step": end.get("start", 0)}))
        if "code" in end:
            (run / "attempts" / f"{number:04d}.end.json").write_text(json.dumps(end))
    write_plan(run, PlannedRun(stage, total_steps, total_steps, 5, 2, num_runs, ("data      data/digits",)))
    if inputs is not None:
        write_inputs(run, inputs)
    return run


def training_rows(steps: int = 20, *, evaluate_every: int = 5, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a training with evaluations; ``names``: further metrics of evaluations, between 0 and 1."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 3.0 / step, "grad_norm": 1.0 + 1 / step, "lr": 1e-3 * math.sin(step / steps)}
        row |= {"images_per_second": 100.0 + step, "data_wait": 0.1} if step % 2 == 0 else {}
        rows.append(row | {"time": 1.7e9 + step})
        if step % evaluate_every == 0:
            evaluation = {"step": step, "val_loss": 2.0 / step, "val_top1": step / steps}
            rows.append(evaluation | dict.fromkeys(names, step / steps / 2) | {"time": 1.7e9 + step})
    return rows


def write_lines(file: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    file.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def draw_picture(run: Path, name: str, step: int, title: str, description: str, side: int = 16) -> Path:
    """Save a picture into a run."""
    file = run / "pictures" / f"{name}-{step:08d}.png"
    file.parent.mkdir(exist_ok=True)
    save_picture(file, Picture(Image.new("RGB", (side, side), (200, 30, 30)), title, description))
    return file


def copy_old_run(name: str, to: Path) -> Path:
    """Copy a run that version 0.1.0 wrote, whose files may be read-only."""
    shutil.copytree(FIXTURES / name / "runs" / name, to, copy_function=shutil.copyfile)
    return to
