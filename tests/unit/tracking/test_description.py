"""The description of a run in a store: short, of what matters, and harmless whatever users call things."""

from pathlib import Path

from fake_facts import write_run_inputs

from foveal.runs.inputs import ModelInput
from foveal.tracking.description import describe_run, main_results


def test_names_of_users_are_text(tmp_path: Path) -> None:
    user = "me:secret"
    model = ModelInput("init", f"/a`b\n<script>/{user}", "a" * 64, "<b>", 3)
    inputs = write_run_inputs(tmp_path / "r`un", model)
    settings = {"model.name": "<script>alert(1)</script>\n# x", "epochs": 3, "batch.global_size": 8}
    tags = {"state": "failed", "why_stopped": f"<img src=x> at http://{user}@there/"}
    text = describe_run(tmp_path, "pretrain", settings, tags, inputs, {"val_<i>": 0.5, "loss": float("nan")})
    outside_code = "".join(text.split("`")[::2])
    assert outside_code.replace("\\<", "").count("<") == 0
    assert "secret@" not in text and "http://there/" in text
    assert text.splitlines()[0].startswith("**Pretraining** of ")
    assert "**Failed**: \\<img src=x\\>" in text
    assert text.count("`") % 2 == 0


def test_results_of_evaluations_come_alone() -> None:
    results = {"loss": 1.0, "val_top1": 0.5, "holdout_top1": 0.25}
    assert main_results(results) == {"val_top1": 0.5, "holdout_top1": 0.25}
    assert main_results({"loss": 1.0}) == {"loss": 1.0}
    arms = {"a_lr_per_256": 0.1, "a_top1": 0.5, "a_top1_lowest": 0.4, "a_top1_highest": 0.6}
    assert main_results(arms) == {"a_top1": 0.5}


def test_a_long_one_is_cut(tmp_path: Path) -> None:
    inputs = write_run_inputs(tmp_path, *(ModelInput(f"arm.{n}", "/x" * 50, "a" * 64, "s", 1) for n in range(200)))
    assert len(describe_run(tmp_path, "", {}, {}, inputs, {})) < 8000


def test_a_run_without_anything(tmp_path: Path) -> None:
    assert describe_run(tmp_path, "", {}, {}, None, {}).startswith("**Training**")
