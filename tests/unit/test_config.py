"""Settings: every user error gets one sentence, and a resume compares only science."""

from pathlib import Path
from typing import Literal, Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from distill.config import DistillConfig
from finetune.config import FinetuneConfig
from foveal.config import Config, machine, science, set_by_dotted_key
from foveal.data.config import DataConfig
from foveal.errors import ConfigError
from foveal.strict_yaml import parse_yaml
from pretrain.config import PretrainConfig


class Crop(Config):
    scale: tuple[float, float] = science((0.2, 1.0))
    flip: float = science(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={list(self.scale)} must be [lowest, highest]")
        return self


class Data(Config):
    path: str = machine()
    image_size: int = science(ge=1)
    crop: Crop = Crop()


class Cache(Config):
    folder: str | None = None
    bytes: int = science(0)


class Trials(Config):
    arms: dict[str, str | None] = machine()
    rates: tuple[float, ...] = science((1e-3,), min_length=1)


class Study(Config):
    seed: int = science(0, ge=0)
    distance: Literal["cosine", "smooth_l1"] = science("cosine")
    clip: float | None = science(None, gt=0)
    unsaid: str = Field("", description="a field that does not say which half it is")
    data: Data
    trials: Trials | None = science(None)
    cache: Cache = machine(Cache())


WHOLE = "data: {path: here, image_size: 16}\n"


def load(folder: Path, text: str, *overrides: str) -> Study:
    file = folder / "study.yaml"
    file.write_text(text)
    return Study.load(file, overrides)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (WHOLE + "sed: 1", "sed is not a setting. Did you mean 'seed'?"),
        (WHOLE + "zzz: 1", "zzz is not a setting. There are: seed, distance, clip, unsaid, data, trials, cache"),
        (
            "data: {path: a, image_size: 1, imagesize: 2}",
            "data.imagesize is not a setting. Did you mean 'data.image_size'?",
        ),
        (
            "data: {path: a, image_size: 1, crop: {flop: 0.5}}",
            "data.crop.flop is not a setting. Did you mean 'data.crop.flip'?",
        ),
        (WHOLE + "trials: {arms: {}, rate: [0.1]}", "trials.rate is not a setting. Did you mean 'trials.rates'?"),
        ("seed: 1", "data.path is missing and has no default; data.image_size is missing and has no default"),
        ("data: {path: a, image_size: }", "data.image_size is missing and has no default"),
        ("data: {path: a}", "data.image_size is missing and has no default"),
        (WHOLE + "seed: one", "seed: input should be a valid integer (given: 'one')"),
        (WHOLE + "seed: 1.0", "seed: input should be a valid integer (given: 1.0)"),
        (WHOLE + "seed: '1'", "seed: input should be a valid integer (given: '1')"),
        (WHOLE + "seed: true", "seed: input should be a valid integer (given: True)"),
        (WHOLE + "seed: -1", "seed: input should be greater than or equal to 0 (given: -1)"),
        (WHOLE + "clip: 0", "clip: input should be greater than 0 (given: 0)"),
        (WHOLE + "clip: .nan", "clip: input should be a finite number (given: nan)"),
        (WHOLE + "clip: .inf", "clip: input should be a finite number (given: inf)"),
        (WHOLE + "distance: l2", "distance: input should be 'cosine' or 'smooth_l1' (given: 'l2')"),
        (WHOLE + "data2: 1", "data2 is not a setting. Did you mean 'data'?"),
        ("data:", "data.path is missing and has no default; data.image_size is missing and has no default"),
        ("data: 3", "data: a section is expected, such as data.path=... (given: 3)"),
        (
            "data: {path: a, image_size: 1, crop: {scale: [0.1, a]}}",
            "data.crop.scale.1: input should be a valid number (given: 'a')",
        ),
        ("data: {path: a, image_size: 1, crop: {scale: [0.1]}}", "data.crop.scale.1 is missing and has no default"),
        (WHOLE + "1: 2", "1: keys should be strings (given: 1)"),
        ("", "a mapping of settings is expected, and this file has none"),
        (
            "seed\ndata: 1",
            "not valid YAML (mapping values are not allowed here, line 2, column 5: data: 1 ^)",
        ),
        ("- seed", "a mapping of settings is expected, this is list"),
        ("seed: 1\nclip: 1.0\nseed: 2", "line 1: 'seed' is given twice"),
        ("seed: 1\ndata: {path: a, path: b}", "line 2: 'path' is given twice"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value) == f"{tmp_path}/study.yaml: {sentence}"


def test_every_mistake_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed: .*; distanse is not a setting"):
        load(tmp_path, WHOLE + "seed: -1\ndistanse: cosine")


def test_the_check_of_a_section_names_its_values_and_not_the_whole_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, WHOLE, "data.crop.scale=[0.9, 0.1]")
    assert str(caught.value).endswith("data.crop: scale=[0.9, 0.1] must be [lowest, highest]")


@pytest.mark.parametrize(
    "text", ["seed: [", "seed: 1\n  data: 2", "\x00", "!!python/object/apply:os.getcwd []", "? [a, b]\n: 1"]
)
def test_what_is_no_plain_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study\.yaml: not valid YAML \(") as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_what_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(ConfigError, match=r"study\.yaml: cannot be read"):
        Study.load(tmp_path / "study.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Study.load(tmp_path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "mae_vit_b16.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        Study.load(tmp_path / "mae_vitb16.yaml")
    existing = tmp_path / "mae_vit_b16.yaml"
    assert str(caught.value) == f"{tmp_path / 'mae_vitb16.yaml'}: no such file. Did you mean '{existing}'?"
    with pytest.raises(ConfigError, match=r"no such file$"):
        Study.load(tmp_path / "nowhere" / "x.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("1E3", 1000.0), ("-2.5e2", -250.0), ("1.5e-4", 1.5e-4), ("1_0e2", 1000.0), ("12", 12)),
        *(("010", 10), ("-007", -7), ("08", 8), ("0x1F", 31), ("0o17", 15), (".5", 0.5), ("5.", 5.0), ("1:30", "1:30")),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["e3", "1e", "v1e3", "1e3x", "'1e3'"])
def test_what_only_looks_like_a_number_stays_text(text: str) -> None:
    assert parse_yaml(text) == text.strip("'")


def test_overrides_reach_every_depth_and_the_last_one_counts(tmp_path: Path) -> None:
    cfg = load(
        tmp_path,
        WHOLE,
        "seed=3",
        "seed=4",
        "clip=1e-1",
        "data.crop.flip=0",
        "data.crop.scale=[0.5, 1.0]",
        "trials.arms={mae: runs/a, scratch: null}",
        "data.path=a=b",
    )
    assert (cfg.seed, cfg.clip, cfg.data.crop.flip, cfg.data.crop.scale) == (4, 0.1, 0.0, (0.5, 1.0))
    assert cfg.trials is not None
    assert cfg.trials.arms == {"mae": "runs/a", "scratch": None}
    assert cfg.data.path == "a=b"
    assert load(tmp_path, WHOLE + "clip: 2", "clip=").clip is None
    assert load(tmp_path, WHOLE, "data.path=[unclosed").data.path == "[unclosed"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "'seed' is not an override; write dotted.key=value"),
        ("=3", "'=3' is not an override; write dotted.key=value"),
        ("--seed=3", r"--seed is not a setting. Did you mean 'seed'?"),
        ("data.path.x=3", "'data.path.x': 'path' is a value, not a section"),
        ("data.crop={flip: 1, flip: 0}", "line 1: 'flip' is given twice"),
        ("data.crpo.flip=1", "data.crpo is not a setting. Did you mean 'data.crop'?"),
        ("seed=-1", "seed: input should be greater than or equal to 0 (given: -1)"),
        ("seed=1e1", "seed: input should be a valid integer (given: 10.0)"),
    ],
)
def test_a_mistaken_override_is_one_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, WHOLE, override)
    assert str(caught.value).removeprefix(f"{tmp_path}/study.yaml: ") == sentence


def test_set_dotted_makes_the_sections_on_the_way() -> None:
    tree = {"a": None, "b": {"c": 1}}
    set_by_dotted_key(tree, "a.x.y", 2)
    set_by_dotted_key(tree, "b.d", 3)
    assert tree == {"a": {"x": {"y": 2}}, "b": {"c": 1, "d": 3}}


def test_frozen_to_the_leaf(tmp_path: Path) -> None:
    cfg = load(tmp_path, WHOLE)
    with pytest.raises(ValidationError):
        cfg.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError):
        cfg.data.crop.flip = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(load(tmp_path, WHOLE, "data.crop.scale=[0.1, 0.2]").data.crop.scale, tuple)


def test_science_is_what_can_change_a_result(tmp_path: Path) -> None:
    """A field without a kind is science; all settings in a machine section are machine."""
    cfg = load(tmp_path, WHOLE + "trials: {arms: {a: b}}\ncache: {folder: x, bytes: 7}")
    assert cfg.science_settings() == {
        "seed": 0,
        "distance": "cosine",
        "clip": None,
        "unsaid": "",
        "data.image_size": 16,
        "data.crop.scale": [0.2, 1.0],
        "data.crop.flip": 0.5,
        "trials.rates": [1e-3],
    }
    assert {name: half for name, _, half in cfg.iter_settings() if half == "machine"}.keys() == {
        "data.path",
        "trials.arms",
        "cache.folder",
        "cache.bytes",
    }
    assert cfg.to_flat_dict() == cfg.science_settings() | {
        "data.path": "here",
        "trials.arms": {"a": "b"},
        "cache.folder": "x",
        "cache.bytes": 7,
    }


def test_a_section_that_is_not_there_is_one_fact(tmp_path: Path) -> None:
    cfg = load(tmp_path, WHOLE)
    assert cfg.science_settings()["trials"] is None
    assert not [name for name in cfg.to_flat_dict() if name.startswith("trials.")]


@pytest.mark.parametrize("kind", [PretrainConfig, DistillConfig, FinetuneConfig])
def test_where_a_run_lies_and_how_fast_it_goes_is_no_science(kind: type[Config], tmp_path: Path) -> None:
    tree = {"epochs": 1, "data": {"path": "a", "image_size": 16}, "batch": {"global_size": 64}, "optim": {}}
    tree |= {"teacher": "a"} if kind is DistillConfig else {}
    file = tmp_path / "stage.yaml"
    kind.from_dict(tree, "here").dump(file)
    moved = [
        "data.path=b",
        "batch.max_micro_size=8",
        "run.dir=c",
        "log.every=3",
        "checkpoint.every=7",
        "data.workers=9",
    ]
    moved += ["engine.kind=plain", "engine.precision=bf16", "optim.fused=false", "tracking.uri=null"]
    original = kind.load(file)
    assert kind.load(file, moved).science_settings() == original.science_settings()
    for change in (
        "seed=1",
        "epochs=2",
        "batch.global_size=32",
        "optim.max_grad_norm=1.0",
        "data.augment.hflip=0.1",
        "data.lanes=8",
    ):
        changed = kind.load(file, [change]).science_settings()
        assert {name for name in changed if changed[name] != original.science_settings()[name]} == {
            change.split("=")[0]
        }


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    text=st.text(max_size=12) | st.sampled_from(["1e3", "0x1", "null", "yes", "~", "2024-01-01", "1:30", "- a", "1_0"]),
    number=st.floats(allow_nan=False, allow_infinity=False, min_value=1e-300),
    rates=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3),
)
def test_what_is_dumped_is_loaded_again(text: str, number: float, rates: list[float], tmp_path: Path) -> None:
    tree = {"data": {"path": text, "image_size": 1}, "clip": number, "unsaid": text}
    cfg = Study.from_dict(tree | {"trials": {"arms": {text: text}, "rates": rates}}, "here")
    cfg.dump(tmp_path / "dump.yaml")
    assert Study.load(tmp_path / "dump.yaml") == cfg


def test_a_typo_in_a_list_of_sections_gets_the_nearest_name() -> None:
    tree = {"path": "x", "image_size": 8, "mix": [{"path": "y", "indx": "z", "fraction": 0.5}]}
    with pytest.raises(ConfigError, match=r"mix.0.indx is not a setting. Did you mean 'mix.0.index'\?"):
        DataConfig.from_dict(tree, "x.yaml")
    with pytest.raises(ConfigError, match=r"mix: input should be a valid list"):
        DataConfig.from_dict(tree | {"mix": "y"}, "x.yaml")
