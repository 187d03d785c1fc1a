"""The lineage of a classifier whose encoder was forked and distilled: whole from the card alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, stage_named
from typer.testing import CliRunner

from foveal.cli import app
from foveal.runs.lineage import build_lineage
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
    text = shown(str(export))
    print(text)
