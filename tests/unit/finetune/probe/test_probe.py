"""Probe runs: checks, selection without val, atomic feature cache, and resuming without repeated work."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config import FinetuneConfig
from finetune.probe import features
from finetune.probe import run as probing
from finetune.probe.config import ProbeKind
from finetune.probe.features import build_probed_encoder, load_layer_features
from finetune.probe.plan import ProbePlan, plan_probe_or_training
from finetune.probe.run import ProbeResult, select_layer_metrics
from foveal.data.image.transforms import normalise
from foveal.data.loader import eval_batches
from foveal.distributed.preemption import LeaveRequest, Preemption
from foveal.distributed.world import World
from foveal.errors import CheckpointError, ConfigError, DataError, ExportError, FovealError
from foveal.models import encode
from foveal.models.backbone import backbone_card, build_backbone
from foveal.models.config import VitConfig
from foveal.models.probes import encode_probe_features
from foveal.models.vit import build_encoder, encoder_card
from foveal.training.run import Run
from foveal.training.run_directory import open_run
from foveal.weights.export import Card, write_export

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=16, depth=2, heads=2)
ALL = {"kinds": ["linear", "logistic", "attentive", "knn"], "layers": "all", "linear_lr_per_256": [0.1, 3.0]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export of an untrained encoder."""
    folder = tmp_path_factory.mktemp("teacher") / "export"
    torch.manual_seed(0)
    module = build_encoder(TINY, image_size=16, channels=1)
    write_export(folder, module.state_dict(), Card("pretrain", encoder_card(TINY, 16, 1), (0.3,), (0.4,)))
    return folder


def settings(digits: Path, export: Path | None, folder: Path, **overrides: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "seed": 5,
        "epochs": 2,
        "data": {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 4}
        | {"samples_per_class": 8, "holdout_per_class": 3, "eval_crop_ratio": 1.0}
        | overrides.pop("data", {}),
        "batch": {"global_size": 32, "max_micro_size": 32} | overrides.pop("batch", {}),
        "optim": overrides.pop("optim", {}),
        "engine": {"kind": "plain"},
        "run": {"dir": str(folder)} | overrides.pop("run", {}),
        "tracking": {"uri": None},
        "init": None if export is None else str(export),
        "probe": overrides.pop("probe", {}),
    }
    return FinetuneConfig.from_dict(tree | overrides, "here")


def run_probe(cfg: FinetuneConfig) -> tuple[Run, dict[str, float]]:
    """Run one attempt; return the run, and its summary if it finished."""
    plan = plan_probe_or_training(cfg, 1)
    assert isinstance(plan, ProbePlan)
    with open_run("finetune", plan, ALONE, Preemption(ALONE)) as run:
        assert run is not None
        probing.run_probes(plan, run)
    file = run.path / "finished.json"
    return run, json.loads(file.read_text())["summary"] if file.exists() else {}


@pytest.fixture(scope="module")
def complete_run(
    digits: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """Directory and summary of an uninterrupted run of every kind on every layer."""
    run, summary = run_probe(settings(digits, encoder, tmp_path_factory.mktemp("whole") / "run", probe=ALL))
    return run.path, summary


def test_every_kind_tells_its_number_layer_by_layer(complete_run: tuple[Path, dict[str, float]]) -> None:
    run, summary = complete_run
    hyperparameters = {"linear": "lr_per_256", "logistic": "c", "attentive": "lr_per_256", "knn": "k"}
    for kind, hyperparameter in hyperparameters.items():
        names = {name for name in summary if name.startswith(f"{kind}_")}
        metrics = {f"{kind}_{name}" for name in ("top1", hyperparameter, "holdout_top1")}
        assert names == metrics | {f"{kind}_layer"} | {
            f"{name}_layer_{layer:02d}" for name in metrics for layer in (1, 2)
        }
        assert 0 < summary[f"{kind}_top1"] <= 1
        assert summary[f"{kind}_top1"] == summary[f"{kind}_top1_layer_{summary[f'{kind}_layer']:02d}"]
    assert sorted(file.name for file in run.glob("features/*")) == sorted(
        ["facts.json"]
        + [
            f"{subset}-{column}.npy"
            for subset in ("train", "holdout", "val")
            for column in ("labels", "patches", "pooled")
        ]
    )


def test_the_layer_is_chosen_by_the_holdout_and_judged_by_val(digits: Path, encoder: Path, tmp_path: Path) -> None:
    cfg = settings(digits, encoder, tmp_path, probe={"kinds": ["knn"], "layers": "all"})
    plan = plan_probe_or_training(cfg, 1)
    assert isinstance(plan, ProbePlan)
    for val in ((0.9, 0.1), (0.1, 0.9)):
        results: dict[tuple[ProbeKind, int], ProbeResult] = {
            ("knn", layer): ProbeResult(val[layer - 1], 20, holdout) for layer, holdout in ((1, 0.6), (2, 0.5))
        }
        assert select_layer_metrics(plan, results)["knn_top1"] == val[0]
        results["knn", 2] = ProbeResult(val[1], 20, 0.6)
        assert select_layer_metrics(plan, results)["knn_layer"] == 2  # ties: the deepest layer


def test_the_choice_is_made_on_the_holdout(
    digits: Path, encoder: Path, complete_run: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three candidates, the best on val is not selected."""
    accuracies = {3 * 10: [0.2, 0.7, 0.3], 360: [0.9, 0.4, 0.8]}
    monkeypatch.setattr(probing, "compute_top1_per_candidate", lambda _guesses, part: accuracies[len(part)])
    cfg = settings(digits, encoder, complete_run[0], probe=ALL | {"k": [1, 3, 5]})
    plan = plan_probe_or_training(cfg, 1)
    assert isinstance(plan, ProbePlan)
    task: Any = probing._fit_and_evaluate(plan, complete_run[0], ALONE.device, "knn", 1)
    result = None
    while task is not None:
        task, result = probing._advance(task)
    assert result == ProbeResult(0.4, 3, 0.7)


def test_features_are_the_encoders_of_unchanged_images(
    digits: Path, encoder: Path, complete_run: tuple[Path, dict[str, float]]
) -> None:
    cfg = settings(digits, encoder, complete_run[0], probe=ALL)
    plan = plan_probe_or_training(cfg, 1)
    assert isinstance(plan, ProbePlan)
    arguments = {
        "split": "val",
        "subset": "all",
        "training_seed": 5,
        "rank": 0,
        "world_size": 1,
        "microbatch_size": 360,
    }
    (batch,) = eval_batches(plan.dataset, cfg.data, **arguments)
    module = build_probed_encoder(plan).eval()
    with torch.no_grad():
        token, patches = encode.encode_cls_and_patches(module, normalise(batch.images, plan.mean, plan.std))
    cached = [load_layer_features(complete_run[0], "val", 1, column, ALONE.device) for column in ("pooled", "patches")]
    torch.testing.assert_close(cached[0].load(slice(None)), patches.mean(dim=1), rtol=1e-4, atol=1e-5)  # pooling=avg
    torch.testing.assert_close(cached[1].load(slice(None)), patches, rtol=1e-3, atol=1e-3)
    assert cached[0].labels.equal(batch.labels)
    for name, expected in (("token", token), ("both", torch.cat([token, patches.mean(dim=1)], dim=1))):
        with torch.no_grad():
            pooled, _ = encode_probe_features(module, normalise(batch.images, plan.mean, plan.std), [1, 2], name)
        torch.testing.assert_close(pooled[1], expected)


def test_an_encoder_that_learned_by_the_mean_is_read_as_it_learned(digits: Path, tmp_path: Path) -> None:
    module = build_encoder(TINY, image_size=16, channels=1, pooling="avg", num_classes=10).eval()
    card = Card(
        "finetune", encoder_card(TINY, 16, 1, pooling="avg", num_classes=10), (0.3,), (0.4,), tuple("0123456789")
    )
    write_export(tmp_path / "export", module.state_dict(), card)
    plan = plan_probe_or_training(settings(digits, tmp_path / "export", tmp_path / "run"), 1)
    assert isinstance(plan, ProbePlan)
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        pooled, _ = encode_probe_features(build_probed_encoder(plan).eval(), images, [2], "avg")
        timm_model: Any = module
        torch.testing.assert_close(
            pooled[0], timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
        )


class Killed(BaseException):
    """Stands for SIGKILL: no handler catches it."""


def test_killed_anywhere_it_ends_with_the_same_numbers_and_repeats_nothing(
    digits: Path,
    encoder: Path,
    complete_run: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = settings(digits, encoder, tmp_path / "run", probe=ALL)
    for name, module, calls in (("_compute_columns", features, 4), ("_advance", probing, 40)):
        with monkeypatch.context() as patched:
            kill_after(patched, module, name, calls)
            with pytest.raises(Killed):
                run_probe(cfg)
        cache = tmp_path / "run" / "features"
        assert cache.exists() == (name == "_advance")
        assert [draft.name for draft in (tmp_path / "run").glob(".draft-*")] == [".draft-features-1"] * (
            name == "_compute_columns"
        )
    results = sorted((tmp_path / "run" / "probes").iterdir())
    assert 0 < len(results) < 8
    before = {file: file.stat().st_mtime_ns for file in [*results, *cache.iterdir()]}
    _, summary = run_probe(cfg)
    assert summary == complete_run[1]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def kill_after(patched: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> None:
    """Kill the attempt at the call after ``calls`` calls of a function."""
    function, remaining = getattr(module, name), iter(range(calls))

    def call(*arguments: Any) -> Any:
        if next(remaining, None) is None:
            raise Killed
        return function(*arguments)

    patched.setattr(module, name, call)


@pytest.mark.parametrize("calls", [2, 20])
def test_asked_to_leave_it_leaves_and_goes_on_later(
    calls: int,
    digits: Path,
    encoder: Path,
    complete_run: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = settings(digits, encoder, tmp_path / "run", probe=ALL)
    answers: Iterator[LeaveRequest | None] = iter([*[None] * calls, LeaveRequest()])
    with monkeypatch.context() as patched:
        patched.setattr(Run, "check_preemption", lambda _run: next(answers))
        run, summary = run_probe(cfg)
    assert run.is_preempted
    assert not summary
    assert (run.path / "features").exists() == (calls == 20)
    assert run_probe(cfg)[1] == complete_run[1]


def test_features_of_something_else_are_refused(digits: Path, encoder: Path, tmp_path: Path) -> None:
    cfg = settings(digits, encoder, tmp_path / "run")
    _, summary = run_probe(cfg)
    (tmp_path / "run" / "finished.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds features of another kind \(differing: precision\): remove"):
        run_probe(FinetuneConfig.from_dict(cfg.to_dict() | {"engine": {"kind": "plain", "precision": "bf16"}}, "here"))
    (tmp_path / "run" / "features" / "facts.json").write_text("{")
    with pytest.raises(CheckpointError, match="holds features of another kind"):
        run_probe(cfg)
    shutil.rmtree(tmp_path / "run" / "features")
    (tmp_path / "run" / "probes" / "linear-02.json").write_text("of the features that are gone")
    assert run_probe(cfg)[1] == summary


def test_a_full_disk_is_said(digits: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "pwrite", full)
    with pytest.raises(CheckpointError, match=r"cannot keep the features \(No space left on device\): make room"):
        run_probe(settings(digits, encoder, tmp_path / "run"))


def test_random_features_and_any_model_of_timm_are_probed(digits: Path, tmp_path: Path) -> None:
    _, summary = run_probe(settings(digits, None, tmp_path / "random", model=TINY.to_dict()))
    assert set(summary) == {"linear_top1", "linear_lr_per_256", "linear_holdout_top1"}
    backbone = build_backbone("test_resnet", 32, 1)
    write_export(
        tmp_path / "export",
        backbone.state_dict(),
        Card("distill", backbone_card("test_resnet", 32, 1), (0.3,), (0.4,)),
    )
    overrides = {"data": {"image_size": 32}, "probe": {"kinds": ["knn"]}}
    run, summary = run_probe(settings(digits, tmp_path / "export", tmp_path / "run", **overrides))
    assert summary["knn_top1"] > 0.2
    assert np.load(run.path / "features" / "val-pooled.npy").shape[:2] == (1, 360)


@pytest.mark.parametrize(
    ("overrides", "kind", "sentence"),
    [
        ({"drop_path": 0.1}, ConfigError, "drop_path=0.1 is for training the encoder, which a probe leaves as it is"),
        ({"optim": {"lr_per_256": 1.0}}, ConfigError, r"the heads' rates are probe.linear_lr_per_256 and"),
        ({"probe": {"layers": [1, 3]}}, ConfigError, "probe.layers has 3, and the encoder has blocks 1 to 2"),
        ({"probe": {"layers": [0]}}, ConfigError, r"probe.layers.*greater than or equal to 1"),
        ({"probe": {"kinds": []}}, ConfigError, r"probe.kinds: .*at least 1"),
        ({"probe": {"kinds": ["svm"]}}, ConfigError, "probe.kinds.0"),
        ({"probe": {"kinds": ["knn"], "k": [81]}}, ConfigError, "probe.k has 81, and there are 80 images"),
        ({"probe": {"kinds": ["knn"], "metric": "euclidean"}}, ConfigError, "probe.vote=softmax weighs cosine"),
        (
            {"probe": {"max_gigabytes": 1e-6}},
            ConfigError,
            r"probe.max_gigabytes=1e-06, but the features of 470 images in 1 layers",
        ),
        ({"probe": {"kinds": ["attentive"], "max_gigabytes": 1e-4}}, ConfigError, "but the patches of 470 images"),
        ({"batch": {"global_size": 128}}, Exception, "128"),
        (
            {"data": {"holdout_per_class": 0}, "probe": {"linear_lr_per_256": [0.1, 1.0]}},
            ConfigError,
            "probe.linear: 2 values of lr_per_256 to choose from, but data.holdout_per_class=0 leaves nothing to choose by",
        ),
        (
            {"data": {"holdout_per_class": 0}, "probe": {"layers": "all"}},
            ConfigError,
            "probe.layers: 2 layers to choose",
        ),
        ({"init": None}, ConfigError, "model is missing: without init"),
        ({"init": "nowhere"}, ExportError, "nowhere is no export"),
        ({"data": {"train": "nothing"}}, DataError, "split 'nothing' does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_it_begins(
    overrides: dict[str, Any], kind: type[FovealError], sentence: str, digits: Path, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=sentence):
        plan_probe_or_training(settings(digits, encoder, tmp_path / "run", **overrides), 1)


@pytest.mark.parametrize(
    ("probe", "sentence"),
    [
        ({"layers": [1]}, r"probe.layers=\(1,\): of a model of timm \(test_resnet\) only the pooled feature is read"),
        ({"features": "token"}, "probe.features=token: of a model of timm"),
        ({"kinds": ["attentive"]}, "probe.kinds with attentive: of a model of timm"),
    ],
)
def test_of_a_model_of_timm_only_its_feature_is_read(
    probe: dict[str, Any], sentence: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan_probe_or_training(
            settings(digits, None, tmp_path, data={"image_size": 32}, backbone="test_resnet", probe=probe), 1
        )


def test_an_encoder_that_broke_is_said(digits: Path, encoder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = build_encoder(TINY, image_size=16, channels=1)
    weights = module.state_dict() | {"norm.weight": torch.full((16,), 3e38)}  # finite, and their features are not
    write_export(tmp_path / "export", weights, Card("pretrain", encoder_card(TINY, 16, 1), (0.3,), (0.4,)))
    with pytest.raises(ExportError, match="gives features that are not finite"):
        run_probe(settings(digits, tmp_path / "export", tmp_path / "run"))
