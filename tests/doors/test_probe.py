"""The one command of a probe, as a user types it."""

import json
import warnings
from pathlib import Path

import pytest
import yaml
from processes import ROOT, ended


@pytest.mark.thorough
def test_probes_are_one_command(configs: dict[str, Path], tmp_path: Path) -> None:
    tree = yaml.safe_load(configs["finetune"].read_text())
    told = {name: tree[name] for name in ("seed", "data", "batch", "init")}
    told |= {"epochs": 2, "optim": {}, "probe": {"kinds": ["linear", "attentive", "knn"]}}
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump(told))
    done = ended(["accelerate", "launch", ROOT / "finetune" / "run.py", "probe.yaml"], tmp_path)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "runs" / "probe" / "finished.json").read_text())["summary"]
    assert set(summary) == {
        "linear_top1",
        "linear_lr_per_256",
        "attentive_top1",
        "attentive_lr_per_256",
        "knn_top1",
        "knn_k",
    }
    assert summary["knn_top1"] > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what MLflow says of its own libraries is not ours to mend
        from mlflow.tracking import MlflowClient

        (found,) = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}").search_runs(["1"])
    assert {name: found.data.metrics[name] for name in summary} == summary
