"""Probes as runs: what is refused, what val may not decide, features whole or not at all, and nothing done twice."""

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
from finetune.probe.features import load_features, load_frozen_encoder
from finetune.probe.plan import ProbePlan, plan_probe
from finetune.probe.run import ProbeResult, summarize_results
from foveal.data import eval_batches, normalise
from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.errors import CheckpointError, ConfigError, DataError, ExportError, FovealError
from foveal.models import encode
from foveal.models.backbone import backbone_card, build_backbone
from foveal.models.probes import encode_probe_features
from foveal.models.vit import VitConfig, build_encoder, encoder_card
from foveal.training.run import Run
from foveal.training.run_directory import open_run
from foveal.weights.export import Card, write_export

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=16, depth=2, heads=2)
ALL = {"kinds": ["linear", "logistic", "attentive", "knn"], "layers": "all", "linear_lr_per_256": [0.1, 3.0]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder's export, made without training."""
    folder = tmp_path_factory.mktemp("teacher") / "export"
    torch.manual_seed(0)
    module = build_encoder(TINY, image_size=16, channels=1)
    write_export(folder, module.state_dict(), Card("pretrain", encoder_card(TINY, 16, 1), (0.3,), (0.4,)))
    return folder


def settings(digits: Path, export: Path | None, folder: Path, **further: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "seed": 5,
        "epochs": 2,
        "data": {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 4}
        | {"per_class": 8, "holdout_per_class": 3, "crop_ratio": 1.0}
        | further.pop("data", {}),
        "batch": {"images": 32, "at_once": 32} | further.pop("batch", {}),
        "optim": further.pop("optim", {}),
        "engine": {"kind": "plain"},
        "run": {"dir": str(folder)} | further.pop("run", {}),
        "tracking": {"uri": None},
        "init": None if export is None else str(export),
        "probe": further.pop("probe", {}),
    }
    return FinetuneConfig.from_dict(tree | further, "here")


def probed(cfg: FinetuneConfig) -> tuple[Run, dict[str, float]]:
    """One attempt; the run, and its summary if it is finished."""
    found = plan_probe(cfg, 1)
    assert isinstance(found, ProbePlan)
    with open_run("finetune", found, ALONE, Preemption(ALONE)) as run:
        assert run is not None
        probing.run_probes(found, run)
    file = run.path / "finished.json"
    return run, json.loads(file.read_text())["summary"] if file.exists() else {}


@pytest.fixture(scope="module")
def whole(digits: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Every kind on every layer, never interrupted."""
    run, summary = probed(settings(digits, encoder, tmp_path_factory.mktemp("whole") / "run", probe=ALL))
    return run.path, summary


def test_every_kind_tells_its_number_layer_by_layer(whole: tuple[Path, dict[str, float]]) -> None:
    run, summary = whole
    for kind, choice in (("linear", "lr_per_256"), ("logistic", "c"), ("attentive", "lr_per_256"), ("knn", "k")):
        names = {name for name in summary if name.startswith(f"{kind}_")}
        told = {f"{kind}_{each}" for each in ("top1", choice, "holdout_top1")}
        assert names == told | {f"{kind}_layer"} | {f"{name}_layer_{n:02d}" for name in told for n in (1, 2)}
        assert 0 < summary[f"{kind}_top1"] <= 1
        assert summary[f"{kind}_top1"] == summary[f"{kind}_top1_layer_{summary[f'{kind}_layer']:02d}"]
    assert sorted(file.name for file in run.glob("features/*")) == sorted(
        ["facts.json"] + [f"{p}-{c}.npy" for p in ("train", "holdout", "val") for c in ("labels", "patches", "pooled")]
    )


def test_the_layer_is_chosen_by_the_holdout_and_judged_by_val(digits: Path, encoder: Path, tmp_path: Path) -> None:
    cfg = settings(digits, encoder, tmp_path, probe={"kinds": ["knn"], "layers": "all"})
    found = plan_probe(cfg, 1)
    assert isinstance(found, ProbePlan)
    for val in ((0.9, 0.1), (0.1, 0.9)):
        told: dict[tuple[ProbeKind, int], ProbeResult] = {
            ("knn", n): ProbeResult(val[n - 1], 20, held) for n, held in ((1, 0.6), (2, 0.5))
        }
        assert summarize_results(found, told)["knn_top1"] == val[0]
        told["knn", 2] = ProbeResult(val[1], 20, 0.6)
        assert summarize_results(found, told)["knn_layer"] == 2  # of equal ones the deepest


def test_the_choice_is_made_on_the_holdout(
    digits: Path, encoder: Path, whole: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three choices: the one that is best on val is not taken."""
    rights = {3 * 10: [0.2, 0.7, 0.3], 360: [0.9, 0.4, 0.8]}
    monkeypatch.setattr(probing, "compute_top1", lambda _guesses, part: rights[len(part)])
    cfg = settings(digits, encoder, whole[0], probe=ALL | {"k": [1, 3, 5]})
    found = plan_probe(cfg, 1)
    assert isinstance(found, ProbePlan)
    work: Any = probing._fit_and_evaluate(found, whole[0], ALONE.device, "knn", 1)
    told = None
    while work is not None:
        work, told = probing._advance(work)
    assert told == ProbeResult(0.4, 3, 0.7)


def test_features_are_the_encoders_of_unchanged_images(
    digits: Path, encoder: Path, whole: tuple[Path, dict[str, float]]
) -> None:
    cfg = settings(digits, encoder, whole[0], probe=ALL)
    found = plan_probe(cfg, 1)
    assert isinstance(found, ProbePlan)
    place = {"split": "val", "subset": "all", "seed": 5, "rank": 0, "world_size": 1, "microbatch_size": 360}
    (batch,) = eval_batches(found.dataset, cfg.data, **place)
    module = load_frozen_encoder(found).eval()
    with torch.no_grad():
        token, patches = encode.encode_cls_and_patches(module, normalise(batch.images, found.mean, found.std))
    ours = [load_features(whole[0], "val", 1, each, ALONE.device) for each in ("pooled", "patches")]
    torch.testing.assert_close(ours[0].load(slice(None)), patches.mean(dim=1), rtol=1e-4, atol=1e-5)  # pooling=avg
    torch.testing.assert_close(ours[1].load(slice(None)), patches, rtol=1e-3, atol=1e-3)
    assert ours[0].labels.equal(batch.labels)
    for name, wanted in (("token", token), ("both", torch.cat([token, patches.mean(dim=1)], dim=1))):
        with torch.no_grad():
            pooled, _ = encode_probe_features(module, normalise(batch.images, found.mean, found.std), [1, 2], name)
        torch.testing.assert_close(pooled[1], wanted)


def test_an_encoder_that_learned_by_the_mean_is_read_as_it_learned(digits: Path, tmp_path: Path) -> None:
    module = build_encoder(TINY, image_size=16, channels=1, pooling="avg", num_classes=10).eval()
    card = Card(
        "finetune", encoder_card(TINY, 16, 1, pooling="avg", num_classes=10), (0.3,), (0.4,), tuple("0123456789")
    )
    write_export(tmp_path / "export", module.state_dict(), card)
    found = plan_probe(settings(digits, tmp_path / "export", tmp_path / "run"), 1)
    assert isinstance(found, ProbePlan)
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        pooled, _ = encode_probe_features(load_frozen_encoder(found).eval(), images, [2], "avg")
        hers: Any = module
        torch.testing.assert_close(pooled[0], hers.forward_head(hers.forward_features(images), pre_logits=True))


class Killed(BaseException):
    """As good as a SIGKILL: nobody catches it."""


def test_killed_anywhere_it_ends_with_the_same_numbers_and_repeats_nothing(
    digits: Path,
    encoder: Path,
    whole: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = settings(digits, encoder, tmp_path / "run", probe=ALL)
    for name, module, calls in (("_compute_columns", features, 4), ("_advance", probing, 40)):
        with monkeypatch.context() as patched:
            counted(patched, module, name, calls)
            with pytest.raises(Killed):
                probed(cfg)
        kept = tmp_path / "run" / "features"
        assert kept.exists() == (name == "_advance")
        assert [each.name for each in (tmp_path / "run").glob(".draft-*")] == [".draft-features-1"] * (name == "_compute_columns")
    done = sorted((tmp_path / "run" / "probes").iterdir())
    assert 0 < len(done) < 8
    before = {file: file.stat().st_mtime_ns for file in [*done, *kept.iterdir()]}
    _, summary = probed(cfg)
    assert summary == whole[1]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def counted(patched: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> None:
    """Let a function be called so many times, and then the attempt is killed."""
    real, left = getattr(module, name), iter(range(calls))

    def call(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return real(*arguments)

    patched.setattr(module, name, call)


@pytest.mark.parametrize("calls", [2, 20])
def test_asked_to_leave_it_leaves_and_goes_on_later(
    calls: int,
    digits: Path,
    encoder: Path,
    whole: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = settings(digits, encoder, tmp_path / "run", probe=ALL)
    answers: Iterator[bool] = iter([*[False] * calls, True])
    with monkeypatch.context() as patched:
        patched.setattr(Run, "check_preemption", lambda _run: next(answers))
        run, summary = probed(cfg)
    assert run.is_preempted
    assert not summary
    assert (run.path / "features").exists() == (calls == 20)
    assert probed(cfg)[1] == whole[1]


def test_features_of_something_else_are_refused(digits: Path, encoder: Path, tmp_path: Path) -> None:
    cfg = settings(digits, encoder, tmp_path / "run")
    _, summary = probed(cfg)
    (tmp_path / "run" / "finished.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds features of another kind \(differing: precision\): remove"):
        probed(FinetuneConfig.from_dict(cfg.to_dict() | {"engine": {"kind": "plain", "precision": "bf16"}}, "here"))
    (tmp_path / "run" / "features" / "facts.json").write_text("{")
    with pytest.raises(CheckpointError, match="holds features of another kind"):
        probed(cfg)
    shutil.rmtree(tmp_path / "run" / "features")
    (tmp_path / "run" / "probes" / "linear-02.json").write_text("of the features that are gone")
    assert probed(cfg)[1] == summary


def test_a_full_disk_is_said(digits: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "pwrite", full)
    with pytest.raises(CheckpointError, match=r"cannot keep the features \(No space left on device\): make room"):
        probed(settings(digits, encoder, tmp_path / "run"))


def test_random_features_and_any_model_of_timm_are_probed(digits: Path, tmp_path: Path) -> None:
    _, summary = probed(settings(digits, None, tmp_path / "random", model=TINY.to_dict()))
    assert set(summary) == {"linear_top1", "linear_lr_per_256", "linear_holdout_top1"}
    backbone = build_backbone("test_resnet", 32, 1)
    write_export(
        tmp_path / "export",
        backbone.state_dict(),
        Card("distill", backbone_card("test_resnet", 32, 1), (0.3,), (0.4,)),
    )
    told = {"data": {"image_size": 32}, "probe": {"kinds": ["knn"]}}
    run, summary = probed(settings(digits, tmp_path / "export", tmp_path / "run", **told))
    assert summary["knn_top1"] > 0.2
    assert np.load(run.path / "features" / "val-pooled.npy").shape[:2] == (1, 360)


@pytest.mark.parametrize(
    ("further", "kind", "sentence"),
    [
        ({"trials": {"arms": {"a": None}, "lr_per_256": [1.0]}}, ConfigError, "probe and trials exclude each other"),
        ({"run": {"stop_at": 3}}, ConfigError, "run.stop_at and probe exclude each other"),
        ({"data": {"mix": [{"path": "x", "share": 0.1}]}}, ConfigError, "data.mix and probe exclude each other"),
        ({"drop_path": 0.1}, ConfigError, "drop_path=0.1 is for training the encoder, which a probe leaves as it is"),
        ({"optim": {"lr_per_256": 1.0}}, ConfigError, r"the heads' rates are probe.linear_lr_per_256 and"),
        ({"probe": {"layers": [1, 3]}}, ConfigError, "probe.layers has 3, and the encoder has blocks 1 to 2"),
        ({"probe": {"layers": [0]}}, ConfigError, r"probe.layers.*greater than or equal to 1"),
        ({"probe": {"kinds": []}}, ConfigError, r"probe.kinds: .*at least 1"),
        ({"probe": {"kinds": ["svm"]}}, ConfigError, "probe.kinds.0"),
        ({"probe": {"kinds": ["knn"], "k": [81]}}, ConfigError, "probe.k has 81, and there are 80 images"),
        ({"probe": {"kinds": ["knn"], "metric": "euclidean"}}, ConfigError, "probe.vote=softmax weighs cosine"),
        (
            {"probe": {"gigabytes": 1e-6}},
            ConfigError,
            r"probe.gigabytes=1e-06, but the features of 470 images in 1 layers",
        ),
        ({"probe": {"kinds": ["attentive"], "gigabytes": 1e-4}}, ConfigError, "but the patches of 470 images"),
        ({"batch": {"images": 128}}, Exception, "128"),
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
    further: dict[str, Any], kind: type[FovealError], sentence: str, digits: Path, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=sentence):
        plan_probe(settings(digits, encoder, tmp_path / "run", **further), 1)


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"layers": [1]}, r"probe.layers=\(1,\): of a model of timm \(test_resnet\) only the pooled feature is read"),
        ({"features": "token"}, "probe.features=token: of a model of timm"),
        ({"kinds": ["attentive"]}, "probe.kinds with attentive: of a model of timm"),
    ],
)
def test_of_a_model_of_timm_only_its_feature_is_read(
    told: dict[str, Any], sentence: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan_probe(settings(digits, None, tmp_path, data={"image_size": 32}, backbone="test_resnet", probe=told), 1)


def test_an_encoder_that_broke_is_said(digits: Path, encoder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = build_encoder(TINY, image_size=16, channels=1)
    weights = module.state_dict() | {"norm.weight": torch.full((16,), torch.nan)}
    write_export(tmp_path / "export", weights, Card("pretrain", encoder_card(TINY, 16, 1), (0.3,), (0.4,)))
    with pytest.raises(ExportError, match="gives features that are not finite"):
        probed(settings(digits, tmp_path / "export", tmp_path / "run"))
