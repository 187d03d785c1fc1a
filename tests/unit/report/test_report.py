"""A page of a run or a pipeline: what it says, what it never contains, and which folders it can be made of."""

import base64
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_run import HOSTILE, SECRET, PageReader, write_hostile_run
from PIL import Image
from run_directories import leave_without_word, make_run
from run_folders import FIXTURES, copy_old_run, draw_picture, training_rows, write_lines, write_run

from foveal.errors import CheckpointError
from foveal.report.curves import Curves
from foveal.report.page import encode_for_script
from foveal.report.report import write_report
from foveal.report.summary import describe_attempts, summarize
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs
from foveal.runs.record import read_run

OLD_RUNS = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "runs" / folder.name).is_dir())


def page_of(path: Path) -> PageReader:
    return PageReader(write_report(path).read_text())


def charts_in(page: PageReader, file: Path) -> dict[str, dict]:
    text = file.read_text()
    (data,) = re.findall(r'<script type="application/json" id="chart-data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def test_a_run_in_a_page(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "runs" / "first",
        rows=training_rows(),
        summary={"val_top1": 0.91234, "val_loss": 0.1},
        notes=["the rate is at the end of its list"],
        inputs=RunInputs(
            "", "pretrain", (DatasetInput("training", "digits", "d", "train", "abcdef" * 9, 1437, 20, 10),)
        ),
    )
    draw_picture(run, "reconstruction", 10, "Reconstructions", "eight digits")
    draw_picture(run, "reconstruction", 20, "Reconstructions", "eight digits, later")
    page = page_of(run)
    for text in ("Pretraining", "first", "finished", "0.9123", "the rate is at the end", "1,437", "abcdefabcdef"):
        assert text in page.text
    assert [image["alt"] for image in page.all_of("img")] == ["eight digits, later", "eight digits"]
    assert page.all_of("html") == [{"lang": "en"}]
    assert charts_in(page, run / "report.html").keys() == {
        "run-loss",
        "run-evaluation-0",
        "run-lr",
        "run-norm",
        "run-speed",
        "run-wait",
    }
    assert not page.dangers()


def test_headings_are_in_order_and_ids_unique(tmp_path: Path) -> None:
    run = write_hostile_run(tmp_path)
    for path in (run, tmp_path):
        page = page_of(path)
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert levels.count(1) == 1 and levels[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)) and not [name for name in ids if " " in name]


def test_every_chart_has_an_alternative(tmp_path: Path) -> None:
    page = page_of(write_hostile_run(tmp_path))
    plots = [attributes for attributes in page.all_of("div") if "data-chart" in attributes]
    assert len(plots) > 8
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 20 for plot in plots)


def test_the_policy_allows_the_scripts_of_the_page_and_nothing_else(tmp_path: Path) -> None:
    file = write_report(write_run(tmp_path / "run", rows=training_rows()))
    (policy,) = [meta["content"] for meta in PageReader(file.read_text()).all_of("meta") if "http-equiv" in meta]
    scripts = re.findall(r"<script>(.*?)</script>", file.read_text(), re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert "default-src 'none'" in policy and len(scripts) == 2
    assert policy.partition("script-src ")[2].partition(";")[0] == " ".join(f"'sha256-{found}'" for found in hashes)


def test_texts_of_users_are_texts(tmp_path: Path) -> None:
    run = write_hostile_run(tmp_path)
    page = page_of(run)
    assert not page.dangers()
    assert len(page.all_of("script")) == 3
    for text in HOSTILE:
        assert text in page.text
    for text in HOSTILE:  # in the legends of charts, without a meaning for Plotly
        name = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert name in json.dumps(charts_in(page, run / "report.html"), ensure_ascii=False).replace('\\"', '"')


def test_no_planted_secret_is_in_a_page(tmp_path: Path) -> None:
    run = write_hostile_run(tmp_path)
    write_report(run)
    write_report(tmp_path)
    assert SECRET in (run / "config.yaml").read_text()
    assert SECRET not in (run / "report.html").read_text() + (tmp_path / "report.html").read_text()


def test_json_in_a_page_cannot_end_its_script() -> None:
    value = {"</script>": ["<!--", "a&b", "\u2028", float("nan"), float("inf"), 1.5]}
    text = encode_for_script(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script>": ["<!--", "a&b", "\u2028", None, None, 1.5]}


def test_what_happened_is_marked(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        rows=training_rows(),
        attempts=[
            {"code": 5, "why": "a rank was lost", "step": 7, "seconds": 2.0},
            {"code": 0, "why": "finished", "step": 20, "seconds": 2.0, "start": 6},
        ],
    )
    write_lines(run / "refused.jsonl", [{"step": step, "batch": step, "samples": []} for step in (3, 4, 5)])
    write_lines(run / "rollbacks.jsonl", [{"time": 1.0, "to": 2, "refused": [3, 4, 5], "batches": [2, 3, 4]}])
    write_lines(run / "quarantine.jsonl", [{"step": 8, "split": "train"}, {"step": 8, "split": "train"}])
    page = page_of(run)
    assert "2 attempts, 3 refused updates, 1 roll-back, 2 images that did not decode" in page.text
    loss = charts_in(page, run / "report.html")["run-loss"]
    lane = {trace["name"]: trace["x"] for trace in loss["data"] if trace.get("yaxis") == "y3"}
    assert lane == {
        "image that did not decode": [8],
        "update refused": [3, 4, 5],
        "roll-back": [5],
        "attempt begins": [0, 6],
    }
    assert [shape["x0"] for shape in loss["layout"]["shapes"]] == [6, 5]
    (best,) = [trace for trace in loss["data"] if trace["name"] == "best val_loss"]
    assert best["x"] == [20]


def test_a_pipeline_is_a_chain(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = write_run(runs / "chain" / "pretrain", rows=training_rows(), summary={"val_loss": 0.5})
    encoder = ModelInput("init", str(first / "export"), "0" * 64, "pretrain", 20, None)
    settings = {"run": {"pipeline": str(runs / "chain")}}
    write_run(
        runs / "beside",
        stage="finetune",
        settings=settings,
        rows=training_rows(),
        attempts=[{}],
        inputs=RunInputs("", "finetune", (), (encoder,)),
    )
    write_run(runs / "stranger", rows=training_rows())
    page = page_of(runs / "chain")
    assert "1 of 2 finished" in page.text
    assert "from pretrain as init" in page.text
    assert "beside" in page.text and "stranger" not in page.text
    assert {"#stage-1", "#stage-2"} <= {link.get("href") for link in page.all_of("a")}


def test_folds_of_an_array_are_no_stages(tmp_path: Path) -> None:
    write_run(tmp_path / "chain" / "pretrain", rows=training_rows(steps=2))
    for number in range(40):  # before the run that they belong to
        write_run(tmp_path / "chain" / "finetune" / "folds" / f"seed0-fold{number}", stage="finetune")
    assert "1 stage " in page_of(tmp_path / "chain").text


def test_of_very_many_attempts_the_first_and_the_last_are_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", attempts=[{"code": 5, "why": f"end {number}"} for number in range(1, 501)])
    text = page_of(run).text
    assert "end 1" in text and "end 500" in text
    assert "end 250" not in text


@pytest.mark.parametrize("name", OLD_RUNS)
def test_a_run_of_version_0_1_has_a_page(name: str, tmp_path: Path) -> None:
    page = page_of(copy_old_run(name, tmp_path / "old"))
    assert "old" in page.text and "All " in page.text
    assert not page.dangers()


@pytest.mark.parametrize("attempts", [[], [{}], [{"code": 3, "why": "diverged: loss not finite", "step": 2}]])
def test_a_run_without_a_row_has_a_page(attempts: list[dict], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", attempts=attempts)
    (run / "metrics.jsonl").unlink()
    page = page_of(run)
    assert "Settings" in page.text
    assert (run / "report.html").stat().st_size < 200_000  # no chart, no library


def test_damaged_files_are_named_and_do_not_end_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows=training_rows())
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write("{broken\n")
    (run / "inputs.json").write_text('{"run": 3}')
    (run / "evaluation.json").write_text('{"per_class": [3]}')
    (run / "fork.json").write_text("{}")
    (run / "finished.json").write_text(
        '{"summary": {}, "notes": 3, "seconds": "long", "total_seconds": null, "science": {}}'
    )
    (run / "refused.jsonl").write_text('nonsense\n{"step": "x"}\n[]\n{"step": NaN}\n')
    (run / "stragglers.jsonl").write_text('{"step": 1}\n{"step": 1, "rank": "x", "step_seconds": "y"}\n')
    text = page_of(run).text
    for name in ("metrics.jsonl", "inputs", "evaluation.json", "fork.json", "finished.json"):
        assert name in text


def test_losses_that_are_not_finite_are_said(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0 if step < 3 else float("nan"), "time": 1.0} for step in range(1, 6)]
    page = page_of(write_run(tmp_path / "run", rows=rows))
    assert "3 values not finite" in page.text


@pytest.mark.parametrize("num_classes", [1, 1000])
def test_any_number_of_classes(num_classes: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stage="finetune", rows=training_rows(), summary={"val_top1": 0.5})
    classes = [f"class {number}" for number in range(num_classes)]
    facts = {
        "step": 20,
        "split": "val",
        "num_images": num_classes,
        "classes": classes,
        "per_class": [{"class": name, "support": 1, "recall": 1.0} for name in classes],
        "confusion": [
            [int(at == row or (row, at) == (2, 3)) for at in range(num_classes)] for row in range(num_classes)
        ],
    }
    (run / "evaluation.json").write_text(json.dumps(facts))
    page = page_of(run)
    assert f"{num_classes} classes" in page.text
    assert ("run-confusion" in charts_in(page, run / "report.html")) == (num_classes == 1)
    assert ("class 2 taken for class 3: 1 of 2." in page.text) == (num_classes == 1000)
    assert (run / "report.html").stat().st_size < 5_500_000


def test_large_pictures_are_reduced_and_too_many_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows=training_rows(steps=2))
    (run / "pictures").mkdir()
    for number in range(30):
        noise = os.urandom(700 * 700 * 3)
        Image.frombytes("RGB", (700, 700), noise).save(run / "pictures" / f"noise-{number + 1:08d}.png")
    page = page_of(run)
    assert 1 <= len(page.all_of("img")) <= 13
    assert "left out, because the page would be too large" in page.text
    assert "12 of 29 earlier" in page.text
    assert (run / "report.html").stat().st_size < 8_000_000


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows=training_rows(steps=2))
    with pytest.raises(CheckpointError, match=r"cannot be written .*--out"):
        write_report(run, tmp_path / "missing" / "report.html")
    with pytest.raises(CheckpointError, match="a file is to be there"):
        write_report(run, run)
    assert not list(tmp_path.rglob("*.draft"))


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_folder_without_runs_is_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "place"
    if kind == "file":
        path.write_text("")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(CheckpointError, match=r"no such folder|is a file|is no run"):
        write_report(path)
    assert not (path / "report.html").exists()


def test_a_folder_of_too_many_runs_is_one_sentence(tmp_path: Path) -> None:
    for number in range(31):
        write_run(tmp_path / "runs" / f"run{number}")
    with pytest.raises(CheckpointError, match="holds 31 runs"):
        write_report(tmp_path / "runs")


def test_the_command_answers_without_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows=training_rows(steps=2))
    lines = [
        "import sys",
        "from foveal.report.cli import compare_command, report_command",
        f"report_command(__import__('pathlib').Path({str(run)!r}))",
        "heavy = [name for name in ('torch', 'timm', 'numpy', 'mlflow') if name in sys.modules]",
        "sys.exit(f'{heavy} were imported' if heavy else 0)",
    ]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(run / "report.html")


def test_a_run_on_another_host_has_the_state_that_its_heartbeat_tells(tmp_path: Path) -> None:
    for age, state in ((0.0, "running"), (3600.0, "no record of its end")):
        run = make_run(tmp_path / f"run{age:.0f}")
        leave_without_word(run, beat_age=age)
        record = read_run(run)
        assert summarize(record, Curves()).state == state
        assert describe_attempts(record)[-1][-1] == state
