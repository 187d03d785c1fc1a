"""What pages read beside the curves: results, settings, lineage, use of nodes, runs inside a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from hostile_run import SECRET
from run_folders import write_lines, write_run

from foveal.atomic import encode_json_lines
from foveal.report import run_charts
from foveal.report.charts import Curve, escape_text, tabulate_curves
from foveal.report.curves import Curves
from foveal.report.events import Events
from foveal.report.lineage import LineageItem, describe_lineage
from foveal.report.nested import read_nested
from foveal.report.results import choose_tiles, draw_confusion, group_results, read_evaluation
from foveal.report.run_charts import draw_throughput
from foveal.report.series import Series
from foveal.report.settings import read_settings
from foveal.report.text import format_duration, format_number
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs
from foveal.runs.lineage import lineage_of_record
from foveal.runs.record import read_run


def test_a_result_and_its_spread_are_one() -> None:
    results = {"a_lr_per_256": 0.1, "a_top1": 0.5, "a_top1_lowest": 0.4, "a_top1_highest": 0.6, "a_holdout_top1": 0.5}
    folds = {"fold_top1_mean": 0.7, "fold_top1_std": 0.1, "fold_top1_lowest": 0.6, "fold_top1_highest": 0.8}
    grouped = {result.name: (result.text, result.spread) for result in group_results(results | folds)}
    assert grouped == {
        "a_lr_per_256": ("0.1", ""),
        "a_top1": ("0.5", "0.4 to 0.6"),
        "a_holdout_top1": ("0.5", ""),
        "fold_top1": ("0.7", "0.6 to 0.8, std 0.1"),
    }


def test_a_headline_has_the_results_that_matter() -> None:
    results = {
        "loss": 1.0,
        "train_top1": 0.9,
        "val_loss": 2.0,
        "val_top1": 0.5,
        "a_lr_per_256": 0.1,
        "a_holdout_top1": 0.4,
        "logistic_c": 1.0,
        "knn_k": 20.0,
        "linear_lr_per_256_layer_03": 0.1,
    }
    assert [result.name for result in choose_tiles(group_results(results))] == [
        "val_top1",
        "val_loss",
        "loss",
        "train_top1",
    ]


def test_settings_that_differ_from_the_defaults() -> None:
    settings = {
        "seed": 0,
        "epochs": 30,
        "mask_ratio": 0.9,
        "log.every": 5,
        "run.dir": "runs/x",
        "data.path": f"https://user:{SECRET}@host/data",
        "data.augment.ratio": [0.75, 4 / 3],
    }
    read = read_settings(settings, "pretrain")
    assert [(setting.name, setting.value, setting.default) for setting in read.science] == [
        ("epochs", "30", ""),
        ("mask_ratio", "0.9", "0.75"),
    ]
    assert [(setting.name, setting.value) for setting in read.machine] == [
        ("log.every", "5"),
        ("data.path", "https://host/data"),
    ]
    assert [setting.name for setting in read.complete] == list(settings)


def test_settings_without_a_stage_are_complete() -> None:
    read = read_settings({"seed": 0}, "")
    assert (read.science, read.machine, read.has_defaults) == ((), (), False)
    assert [setting.name for setting in read.complete] == ["seed"]


def test_shared_ancestors_are_listed_once() -> None:
    inputs = RunInputs("", "pretrain", (DatasetInput("training", "d", "p", "train", "0" * 64, 5, 5),))
    for level in range(40):
        twice = tuple(ModelInput(role, f"/m{level}", str(level), "distill", 1, inputs) for role in ("init", "teacher"))
        inputs = RunInputs("", "distill", (), twice)
    nodes = describe_lineage(lineage_of_record(inputs), Path("/report.html"))

    def count(found: tuple[LineageItem, ...]) -> int:
        return sum(1 + count(node.children) for node in found)

    assert count(nodes) < 100
    assert "as above" in nodes[1].facts and not nodes[1].children


def test_the_use_of_nodes_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [
        {
            "step": step,
            "time": 1.0,
            "node": node,
            "other": 1,
            "at_rest": 0.0,
            "cpu_utilization_percentage": 50.0,
            "gpu_utilization_percentage": [90, 70, None],
        }
        for step in (5, 10)
        for node in ("a", "b")
    ]
    write_lines(run / "nodes.jsonl", [*lines, {"step": "x"}, {"step": 5, "node": "a", "words": "no number"}])
    charts = draw_throughput(read_run(run), Curves(), Events({}, {}))
    assert [chart.title.removeprefix("Nodes: ") for chart in charts] == [
        "gpu utilization (%)",
        "cpu utilization (%)",
        "other",
    ]
    assert [(trace["name"], trace["y"]) for trace in charts[0].traces] == [("a", [80.0, 80.0]), ("b", [80.0, 80.0])]


def test_of_very_many_nodes_the_end_of_the_file_and_eight_nodes_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    steps, nodes = range(1, 101), [f"n\u00f6de{number:03d}" for number in range(100)]
    lines = [{"step": step, "time": 1.0, "node": node, "cpu": 50.0} for step in steps for node in nodes]
    (run / "nodes.jsonl").write_bytes(encode_json_lines(lines))
    monkeypatch.setattr(run_charts, "_MAX_NODE_BYTES", (run / "nodes.jsonl").stat().st_size // 2 - 5)
    num_parsed, parse = 0, json.loads

    def count(line: bytes) -> Any:
        nonlocal num_parsed
        num_parsed += 1
        return parse(line)

    monkeypatch.setattr(json, "loads", count)
    (chart,) = draw_throughput(read_run(run), Curves(), Events({}, {}))
    assert len(chart.traces) == 8 and {len(trace["x"]) for trace in chart.traces} <= {49, 50}
    assert num_parsed < 8 * 50 + 20


def test_an_evaluation_says_what_it_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stage="finetune")
    pair = {"class": "car", "predicted": "tree", "count": 12_000, "support": 50_000}
    facts = {
        "step": 4,
        "split": "val",
        "num_images": 9,
        "unit": "pixels",
        "classes": ["car", "tree"],
        "confusion": None,
    }
    rows = [{"class": "car", "support": 5, "iou": 0.9}, {"class": "tree", "support": 5, "iou": None}]
    (run / "evaluation.json").write_text(json.dumps(facts | {"per_class": rows, "most_confused": [pair]}))
    evaluation = read_evaluation(read_run(run))
    assert evaluation is not None and evaluation.confusion is None
    assert (evaluation.unit, evaluation.confusions) == ("pixels", ("car taken for tree: 12,000 of 50,000.",))
    assert evaluation.rows == (("car", "5", "0.9"), ("tree", "5", ""))


def test_a_matrix_is_of_shares_of_its_rows() -> None:
    chart = draw_confusion(["a", "b"], [[3, 1], [0, 0]])
    assert chart is not None
    assert chart.traces[0]["z"] == [[0.75, 0.25], [0.0, 0.0]]
    assert draw_confusion(["a"], []) is None
    assert draw_confusion(["a", "b"], [[1]]) is None


def test_trials_are_a_table_and_a_chart_by_arm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stage="finetune", num_runs=3, summary={"a_top1": 0.5})
    for name, value in (("a-seed0-lr0.1", 0.5), ("a-seed1-lr0.1", 0.6), ("b-seed0-lr0.1", 0.7)):
        write_run(run / "trials" / name, stage="finetune", summary={"val_top1": value, "val_loss": 1.0})
    write_run(run / "trials" / "b-seed1-lr0.1", stage="finetune", attempts=[{"code": 1, "why": "broken"}])
    left = write_run(run / "trials" / "c", stage="finetune", attempts=[{"code": 0, "why": "preempted"}])
    (left / "tags.json").write_text('{"state": "running"}')  # of an attempt before
    nested = read_nested(read_run(run))
    assert nested is not None and nested.chart is not None
    assert nested.rows[-1][:2] == ("c", "saved, to be continued")
    assert nested.columns == ("trial", "state", "val_top1", "val_loss", "time")
    assert [row[:3] for row in nested.rows][-3:-1] == [
        ("b-seed0-lr0.1", "finished", "0.7"),
        ("b-seed1-lr0.1", "failed", ""),
    ]
    assert [(trace["name"], trace["y"]) for trace in nested.chart.traces] == [("a", [0.5, 0.6]), ("b", [0.7])]


def test_a_table_has_an_evaluation_at_its_own_steps() -> None:
    loss, evaluation = Series(), Series()
    for step in range(1, 101):
        loss.add(step, 1 / step)
    for step in (33, 66):
        evaluation.add(step, float(step))
    columns, rows = tabulate_curves([Curve("loss", loss), Curve("val_top1", evaluation, is_evaluation=True)], "step")
    assert columns == ("step", "loss", "val_top1")
    assert [row for row in rows if row[2]] == [("33", "0.0303", "33"), ("66", "0.01515", "66")]
    assert (rows[0], rows[-1], len(rows)) == (("1", "1", ""), ("100", "0.01", ""), 14)


def test_texts_of_charts_have_no_markup() -> None:
    assert escape_text("a <b>&amp;\n\u2028 c") == "a &lt;b&gt;&amp;amp; c"


def test_numbers_are_short() -> None:
    values = [0, 3, 12345, 0.5, 0.123456, 123.456, 1e-7, 2e12, -0.25, 1234567.8, float("nan"), "text", True]
    assert [format_number(value) for value in values] == [
        *(
            "0",
            "3",
            "12,345",
            "0.5",
            "0.1235",
            "123.5",
            "1e-07",
            "2e+12",
            "-0.25",
            "1,234,568",
            "not finite",
            "text",
            "True",
        )
    ]
    assert [format_duration(seconds) for seconds in (None, 0.42, 42, 312, 12000, 200000)] == [
        *("", "0.4 s", "42 s", "5 min 12 s", "3 h 20 min", "2 d 7 h")
    ]
