"""The lineage of a classifier whose encoder was forked and distilled: whole from the card alone."""

import re
import shutil
from pathlib import Path

import pytest
from ranks import Ranks, stage_named
from typer.testing import CliRunner

from foveal.cli import app
from foveal.runs.inputs import read_inputs
from foveal.runs.lineage import build_lineage, lineage_of_record
from foveal.weights.export import read_card

OLD = Path(__file__).parents[2] / "fixtures" / "v0_1_0" / "exports"
PLAIN = ("engine.kind=plain", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def pipeline(configs: dict[str, Path], one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder, its fork, a student of the fork and a classifier; of all but the classifier nothing is left."""
    root = tmp_path_factory.mktemp("pipeline")
    encoder, fork, student, classifier = (root / name for name in ("encoder", "fork", "student", "classifier"))
    one_rank.train(stage_named("pretrain"), configs["pretrain"], encoder, *PLAIN)
    one_rank.train(stage_named("pretrain"), configs["pretrain"], fork, *PLAIN, f"run.fork={encoder}", "epochs=2")
    one_rank.train(stage_named("distill"), configs["distill"], student, *PLAIN, f"teacher={fork}/export")
    one_rank.train(stage_named("finetune"), configs["finetune"], classifier, *PLAIN, f"init={student}/export")
    for run in (encoder, fork, student):
        shutil.rmtree(run)
    return root


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["lineage", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_chain_is_whole_from_the_card_alone(pipeline: Path) -> None:
    export = shutil.copytree(pipeline / "classifier" / "export", pipeline / "elsewhere" / "export")
    chain = list(build_lineage(export).walk())
    assert [(node.role, node.stage, node.name) for node in chain] == [
        ("", "finetune", "classifier"),
        ("init", "distill", "student"),
        ("teacher", "pretrain", "fork"),
        ("fork", "pretrain", "encoder"),
    ]
    assert not chain[0].list_gaps()
    for node in chain:
        assert [(data.name, data.split) for data in node.datasets if data.role == "training"] == [("digits", "train")]
        assert len(node.sha256) == 64
    lines = [line.strip("\u2502\u251c\u2514\u2500 ") for line in shown(str(export)).splitlines()]
    heads = [line for line in lines if ", step " in line]
    assert heads == [
        f"finetune classifier, step 22, {chain[0].sha256[:12]}",
        f"init: distill student, step 22, {chain[1].sha256[:12]}",
        f"teacher: pretrain fork, step 44, {chain[2].sha256[:12]}",
        f"fork of pretrain encoder, step 22, checkpoint {chain[3].sha256[:12]}",
    ]
    assert lines.count(f"trained on: digits, train, 1,437 images, {chain[0].datasets[0].digest[:12]}") == 4


def test_the_run_and_its_model_card_say_the_same(pipeline: Path) -> None:
    run = pipeline / "classifier"
    inputs = read_inputs(run)
    assert inputs is not None
    assert read_card(run / "export").inputs == inputs.to_dict()
    assert [node.name for node in lineage_of_record(inputs).walk()] == ["classifier", "student", "fork", "encoder"]
    text = (run / "export" / "README.md").read_text()
    assert str(pipeline) not in text
    rows = [line for line in text.splitlines() if re.search(r"`[0-9a-f]{64}` \|$", line)]
    assert [row.rpartition(" | ")[0] for row in rows] == [
        "| init | distill | 22 | digits",
        "| teacher of the init | pretrain | 44 | digits",
        "| forked run of the teacher of the init | pretrain | 22 | digits",
    ]


def test_a_card_of_an_older_version_in_the_chain(configs: dict[str, Path], one_rank: Ranks, tmp_path: Path) -> None:
    """A classifier of an encoder of 0.1.0, whose own origin is known as long as its export is there."""
    old = shutil.copytree(OLD / "encoder", tmp_path / "encoder")
    settings = (*PLAIN, f"init={old}", "data.image_size=8", "run.stop_at_step=null")
    one_rank.train(stage_named("finetune"), configs["finetune"], tmp_path / "run", *settings)
    assert "links" not in shown(str(tmp_path / "run"))
    assert "its version recorded no inputs: from its settings" in shown(str(tmp_path / "run"))
    shutil.rmtree(old)
    text = " ".join(shown(str(tmp_path / "run")).replace("\u2502", " ").split())
    assert "init: pretrain encoder, step 9, da6ef2092ed6" in text
    assert "! missing: what it was made from is not recorded, and" in text
    assert text.endswith("1 link is not whole: see ! above.")
