"""Names of 0.1: translated wherever 0.1 wrote them or a user gives them, with one warning; both names at once are an error."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import foveal.renames
from distill.config import DistillConfig
from finetune.config import FinetuneConfig
from foveal.checkpoint.state import check_science_unchanged
from foveal.config import Config, get_setting_kind, science
from foveal.errors import CheckpointError, ConfigError
from foveal.renames import (
    DROPPED,
    SETTINGS,
    VALUES,
    restore_names,
    translate_metric,
    translate_science,
    translate_setting,
    translate_settings,
)
from foveal.setting_docs import iter_setting_docs
from foveal.setting_names import get_section_class
from pretrain.config import PretrainConfig

STAGES: tuple[type[Config], ...] = (PretrainConfig, DistillConfig, FinetuneConfig)
PRETRAIN_01 = """
epochs: 2
masking: block
mask_block: 2
target: latents
data: {path: data/digits, image_size: 16, augment: {flip: 0.25, operations: 2, magnitude: 7.0}}
batch: {images: 32, at_once: 8}
optim: {lr_per_256: 1.0e-3, warmup_epochs: 1, kind: sgd, clip: 2.0}
"""


def load(tmp_path: Path, text: str, *overrides: str, warnings: list[str] | None = None) -> PretrainConfig:
    (tmp_path / "old.yaml").write_text(text)
    return PretrainConfig.load(tmp_path / "old.yaml", overrides, (warnings if warnings is not None else []).append)


def test_every_new_name_is_a_setting_and_no_old_one_is() -> None:
    names = {setting.name.replace(".N.", ".*.") for stage in STAGES for setting in iter_setting_docs(stage)}
    known = names | {name.rpartition(".")[0] for name in names}
    assert not [new for new in SETTINGS.values() if new not in known]
    assert not [old for old in SETTINGS if old in known]
    assert not [name for name in (*VALUES, *DROPPED) if name not in known]


def test_a_yaml_of_0_1_loads_under_the_new_names_with_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    cfg = load(tmp_path, PRETRAIN_01, "masking=grid", "data.augment.magnitude_std=0.1", warnings=warnings)
    assert (cfg.mask_strategy, cfg.mask_block_size, cfg.target) == ("grid", 2, "features")
    assert (cfg.batch.global_size, cfg.batch.max_micro_size, cfg.optim.name) == (32, 8, "sgd")
    assert cfg.data.augment.rand_augment.to_dict() == {"ops": 2, "magnitude": 7.0, "magnitude_std": 0.1}
    (warning,) = warnings
    for words in ("batch.at_once is now batch.max_micro_size", "target=latents is now target=features", "upgrade FILE"):
        assert words in warning


def test_a_yaml_of_0_2_gives_no_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    cfg = load(tmp_path, PRETRAIN_01)
    cfg.dump(tmp_path / "new.yaml")
    again = PretrainConfig.load(tmp_path / "new.yaml", ("batch.global_size=32",), warnings.append)
    assert again.to_dict() == cfg.to_dict()
    assert not warnings


@pytest.mark.parametrize(
    ("text", "overrides", "names"),
    [
        (PRETRAIN_01 + "mask_strategy: grid\n", (), "masking and mask_strategy"),
        (PRETRAIN_01, ("batch.images=8", "batch.global_size=8"), "batch.images and batch.global_size"),
    ],
)
def test_both_names_at_once_are_refused(text: str, overrides: tuple[str, ...], names: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{names} are one setting: leave out"):
        load(tmp_path, text, *overrides)


def test_an_old_command_line_goes_on_beside_an_upgraded_file(tmp_path: Path) -> None:
    load(tmp_path, PRETRAIN_01).dump(tmp_path / "new.yaml")
    cfg = PretrainConfig.load(tmp_path / "new.yaml", ["batch.images=64", "data.augment.flip=0.75"])
    assert (cfg.batch.global_size, cfg.data.augment.hflip, cfg.data.augment.rand_augment.ops) == (64, 0.75, 2)


def test_an_old_override_may_be_a_section_or_a_list(tmp_path: Path) -> None:
    mix = "data.mix=[{path: more, share: 0.25}]"
    cfg = load(tmp_path, PRETRAIN_01, mix, "data.labels=class", "batch={images: 16}")
    assert cfg.data.mix[0].fraction == 0.25
    assert cfg.batch.to_dict() == {"global_size": 16, "max_micro_size": 64}
    finetune = PRETRAIN_01.partition("masking")[0] + "data: {path: x, image_size: 8}\nbatch: {images: 8}\noptim: {}\n"
    (tmp_path / "old.yaml").write_text(finetune)
    settings = ["data={path: y, image_size: 16, labels: mask}", "early_stopping={metric: val_pixels, patience: 1}"]
    dense = FinetuneConfig.load(tmp_path / "old.yaml", settings, lambda _: None)
    assert (dense.task, dense.data.path) == ("segmentation", "y")
    assert dense.early_stopping is not None
    assert dense.early_stopping.metric == "val_pixel_accuracy"


def test_null_under_an_old_name_is_a_value(tmp_path: Path) -> None:
    assert load(tmp_path, PRETRAIN_01, "optim.clip=null", "run.stop_at=null").optim.max_grad_norm is None


@pytest.mark.parametrize("place", ["data.labels=mask", "data={path: x, image_size: 8, labels: mask}"])
def test_labels_that_pretraining_has_no_use_for(place: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.labels=mask is for fine-tuning; this stage learns from no such label"
    ):
        load(tmp_path, PRETRAIN_01, place)
    warnings: list[str] = []
    load(tmp_path, PRETRAIN_01, "data.labels=class", warnings=warnings)
    assert "data.labels is now no setting of this stage" in warnings[0]


def test_a_value_where_a_section_is_wanted_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'rand_augment' is a value, not a section"):
        load(tmp_path, PRETRAIN_01.replace("flip: 0.25", "rand_augment: 5"))


def test_from_0_3_on_an_old_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foveal.renames, "__version__", "0.3.0")
    with pytest.raises(ConfigError, match=r"batch\.images is now batch\.global_size"):
        load(tmp_path, PRETRAIN_01)


def test_a_section_that_was_renamed_is_moved_as_a_whole() -> None:
    tree = {"lesson_cache": {"dir": "a", "gigabytes": 2.0}, "data": {"mix": [{"path": "p", "share": 0.5}]}}
    translated, renamed = translate_settings(tree, DistillConfig.model_fields)
    assert translated == {
        "teacher_cache": {"dir": "a", "max_gigabytes": 2.0},
        "data": {"mix": [{"path": "p", "fraction": 0.5}]},
    }
    assert renamed["lesson_cache.gigabytes"] == "teacher_cache.max_gigabytes"
    assert renamed["data.mix.0.share"] == "data.mix.0.fraction"
    assert translate_settings({"folds": None}, FinetuneConfig.model_fields)[0] == {"cross_validation": None}


def test_stored_science_is_compared_under_the_new_names(tmp_path: Path) -> None:
    cfg = load(tmp_path, PRETRAIN_01)
    stored = restore_names(cfg.science_settings())
    assert {"batch.images", "masking", "data.augment.flip"} <= stored.keys()
    assert stored["target"] == "latents"
    assert translate_science(stored, cfg.science_settings()) == cfg.science_settings()
    check_science_unchanged(stored, cfg.science_settings(), tmp_path)
    with pytest.raises(CheckpointError, match=r"mask_block_size \(was 4, is 2\)"):
        check_science_unchanged(stored | {"mask_block": 4}, cfg.science_settings(), tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("applied", "step_applied"),
        ("val_map", "val_mAP"),
        ("fold_map_50_mean", "fold_mAP_50_mean"),
        ("train_pixels", "train_pixel_accuracy"),
        ("small/agreement", "small/teacher_agreement"),
        ("val_ap_map", "val_ap_map"),
        ("student/map", "student/map"),
        ("val_miou", "val_miou"),
        ("loss", "loss"),
    ],
)
def test_metrics(old: str, new: str) -> None:
    assert translate_metric(old) == new
    assert translate_metric(new) == new
    assert translate_setting("early_stopping.metric", old)[1] == new


class _Grown(PretrainConfig):
    """Pretraining of a later version, with a new science setting."""

    colour_weight: float = science(0.0, "Weight of a new loss.", since="0.2", neutral=0.0)


def test_a_setting_that_was_added_refuses_no_run_in_flight(tmp_path: Path) -> None:
    """Absence equals the neutral value; every other value is other science."""
    stored = load(tmp_path, PRETRAIN_01).science_settings()
    cfg = _Grown.load(tmp_path / "old.yaml")
    check_science_unchanged(stored, cfg.science_settings(), tmp_path, cfg.neutral_values())
    changed = _Grown.load(tmp_path / "old.yaml", ["colour_weight=0.5"])
    with pytest.raises(CheckpointError, match="colour_weight"):
        check_science_unchanged(stored, changed.science_settings(), tmp_path, changed.neutral_values())
    check_science_unchanged(changed.science_settings(), changed.science_settings(), tmp_path, changed.neutral_values())
    with pytest.raises(CheckpointError, match=r"colour_weight \(was 0\.5, is 0\.0\)"):
        check_science_unchanged(changed.science_settings(), cfg.science_settings(), tmp_path, cfg.neutral_values())


class _GrownSection(Config):
    taps: int = science(3, "Taps.", since="0.2", neutral=1)


class _Changed(Config):
    """Settings of a later version, whose defaults are not what earlier versions did."""

    blur: str = science("wide", "Filter.", since="0.2", neutral="narrow")
    sides: tuple[int, ...] = science((1, 2), "Sides.", since="0.2", neutral=[4])
    old: int = science(7, "As old as the run.")
    section: _GrownSection = _GrownSection()
    sections: tuple[_GrownSection, ...] = science((_GrownSection(), _GrownSection(taps=5)), "Sections.")


@pytest.mark.parametrize(
    ("stated", "saved", "kept"),
    [
        ({}, {"old": 7}, {"blur": "narrow", "sides": [4], "section.taps": 1, "sections.0.taps": 1}),
        ({"blur": "wide"}, {"old": 7}, {"blur": "wide"}),
        ({}, {"blur": "narrow", "section.taps": 1}, {"blur": "narrow", "section.taps": 1}),  # by its second attempt
        ({}, {"blur": "wide", "section.taps": 2}, {"blur": "wide", "section.taps": 3}),  # begun with the setting
        ({}, {"old": 5}, {"old": 7, "sections.1.taps": 5}),  # stated sections stay
    ],
)
def test_a_run_keeps_what_its_version_did(stated: dict[str, Any], saved: dict[str, Any], kept: dict[str, Any]) -> None:
    cfg = _Changed.from_dict(stated, "test").keep_neutral_values(saved)
    assert kept.items() <= cfg.science_settings().items()
    assert _Changed.from_dict(cfg.to_dict(), "test") == cfg


NAMES_01 = json.loads((Path(__file__).parents[1] / "fixtures/v0_1_0/names.json").read_text())


def translated(name: str) -> str:
    return translate_setting(name.replace(".N.", ".0."), None)[0].replace(".0.", ".N.")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_every_setting_and_value_of_0_1_has_its_place(stage: type[Config]) -> None:
    docs = {setting.name: setting for setting in iter_setting_docs(stage)}
    for name, facts in NAMES_01["settings"][stage.__name__.removesuffix("Config").lower()].items():
        new = translated(name)
        if new in DROPPED and new not in docs:
            continue
        assert new in docs or any(other.startswith(f"{new}.") for other in docs), name
        for value in facts.get("values", ()):
            if isinstance(value, str) and new != "task":
                assert f"`{translate_setting(name, value)[1]}`" in docs[new].type_text, (name, value)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_science_that_is_newer_than_0_1_says_since_when(stage: type[Config]) -> None:
    """Otherwise it would refuse every run in flight."""
    old = {translated(name) for name in NAMES_01["settings"][stage.__name__.removesuffix("Config").lower()]}
    assert not [name for name, field in science_fields(stage) if name not in old and "since" not in extra(field)]
    assert [name for name, field in science_fields(_Grown) if "since" in extra(field)][-1] == "colour_weight"


def extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def science_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        section = get_section_class(field)
        if section is None and get_setting_kind(field) == "science":
            yield f"{prefix}{name}", field
        elif section is not None and get_setting_kind(field) == "science":
            yield from science_fields(section, f"{prefix}{name}.{'N.' if 'tuple' in str(field.annotation) else ''}")
