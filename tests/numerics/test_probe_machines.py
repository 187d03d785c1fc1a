"""Probes on any number of ranks: the same features byte for byte, and the same numbers."""

import json
from pathlib import Path

import pytest
import yaml
from ranks import Ranks, stage_named

PROBE = {"kinds": ["linear", "logistic", "attentive", "knn"], "layers": "all", "k": [1, 5]}


@pytest.mark.thorough
def test_features_and_numbers_are_the_same_on_any_ranks(
    configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    tree = yaml.safe_load(configs["finetune"].read_text())
    tree = {name: value for name, value in tree.items() if name not in ("drop_path", "label_smoothing", "optim")}
    tree |= {"optim": {"warmup_epochs": 1}, "data": tree["data"] | {"samples_per_class": 13, "holdout_per_class": 3}}
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump(tree | {"epochs": 2, "probe": PROBE}))
    summaries = []
    for ranks, name, kind in ((one_rank, "one", "plain"), (two_ranks, "two", "accelerate")):
        ranks.train(stage_named("finetune"), tmp_path / "probe.yaml", tmp_path / name, f"engine.kind={kind}")
        summaries.append(json.loads((tmp_path / name / "finished.json").read_text())["summary"])
    assert summaries[0] == summaries[1]
    files = sorted(file.name for file in (tmp_path / "one" / "features").iterdir())
    assert len(files) == 10
    for file in files:
        one, two = ((tmp_path / name / "features" / file).read_bytes() for name in ("one", "two"))
        assert one == two, file
