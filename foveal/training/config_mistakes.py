"""Explanations of a CONFIG that is none: a misspelled name, a folder, a file of another stage; each says what to type."""

import difflib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foveal.config import Config
from foveal.errors import ConfigError
from foveal.renames import translate_settings
from foveal.setting_names import format_alternatives
from foveal.strict_yaml import read_yaml, suggest_file
from foveal.training.config_files import YAML_SUFFIXES, find_config, is_path, list_configs
from foveal.training.stage import STAGE_NAMES, import_stage

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_MOST_FILES = 500  # of a folder that are looked at


def locate_config(stage: str, name_or_path: str) -> Path:
    """Return the file of a stage's config, see ``find_config``. Raises: ConfigError with what to type instead."""
    file = find_config(stage, name_or_path)
    if file is None:
        raise ConfigError(_explain_missing(stage, name_or_path))
    owner = file.parent.name
    if file.parent.parent.name == "configs" and owner in STAGE_NAMES and owner != stage:
        raise ConfigError(_wrong_stage(name_or_path, stage, [owner]))
    return file


def _explain_missing(stage: str, name_or_path: str) -> str:
    """Return why a name or path is no config of a stage, with the names that are near and what to type."""
    if Path(name_or_path).is_dir():
        return _explain_folder(stage, Path(name_or_path))
    name = Path(name_or_path).stem if is_path(name_or_path) else name_or_path
    configs = list_configs(stage)
    near = difflib.get_close_matches(name, configs, n=3)
    if is_path(name_or_path):
        hint = suggest_file(Path(name_or_path)) or (f". {format_alternatives(near)}" if near else "")
        return f"{name_or_path}: no such file{hint or f'; a config of {stage} by its name: {_join(configs)}'}"
    near_files = [name + suffix for suffix in YAML_SUFFIXES if Path(name + suffix).is_file()]
    others = [other for other in STAGE_NAMES if other != stage and name in list_configs(other)]
    if others and not near_files:
        return f"{_wrong_stage(name, stage, others)}; {stage} has {_join(configs)}"
    hint = f" {format_alternatives((near_files + near)[:3])}" if near_files or near else ""
    return f"{stage} has no config '{name}'.{hint} There are {_join(configs)}, and any YAML file by its path"


def locate_stage(name_or_path: str) -> str:
    """Return the stage of a config, by its folder, name or settings. Raises: ConfigError if none or several fit."""
    file = Path(name_or_path)
    if file.parent.name in STAGE_NAMES:
        return file.parent.name
    stages = [stage for stage in STAGE_NAMES if not is_path(name_or_path) and find_config(stage, name_or_path)]
    if not stages and is_path(name_or_path) and not file.is_dir():
        stages = list_stages_of_file(file)
    if len(stages) == 1:
        return stages[0]
    names = [name for stage in STAGE_NAMES for name in list_configs(stage)]
    near = [] if stages else difflib.get_close_matches(name_or_path, names, n=1)
    hint = f". {format_alternatives(near)}" if near else f"; give --stage {'|'.join(stages or STAGE_NAMES)}"
    what = f"{name_or_path} fits several stages" if stages else f"no stage has a config {name_or_path}"
    raise ConfigError(f"{what}{hint}")


def explain_wrong_file(stage: str, file: Path) -> str | None:
    """Return what a file that was refused as a stage's config seems to be and what to type; None if it seems to be one."""
    if file.suffix in _WEIGHTS and not (file.parent / "card.json").is_file():
        return _explain_folder(stage, file)
    if file.suffix in (*_WEIGHTS, ".tar") or file.name in {"card.json", "manifest.json", "science.json"}:
        return _explain_folder(stage, file.parent)
    try:
        tree = read_yaml(file)
    except ConfigError:
        return None
    if isinstance(tree, dict):
        return _explain_settings(stage, file, tree)
    if isinstance(tree, list) and tree and all(isinstance(element, dict) and "stage" in element for element in tree):
        submit = f"python slurm/submit.py {file}"
        return f"{file} is a pipeline of stages: type {submit} for Slurm, or {submit} --cluster local"
    return None


def _explain_settings(stage: str, file: Path, tree: dict[str, Any]) -> str | None:
    if "distributed_type" in tree:
        launch = f"accelerate launch --config_file {file} -m foveal.cli train {stage} CONFIG"
        return f"{file} is a config of Accelerate: type {launch}"
    stages = list_matching_stages(tree)
    return None if stage in stages or not stages else _wrong_stage(str(file), stage, stages)


def list_stages_of_file(file: Path) -> list[str]:
    """Return the stages whose settings a YAML file has, see ``list_matching_stages``; none if it cannot be read."""
    try:
        tree = read_yaml(file)
    except ConfigError:
        return []
    return list_matching_stages(tree) if isinstance(tree, dict) else []


def list_matching_stages(tree: dict[str, Any]) -> list[str]:
    """Return the stages that have all settings of a config at its top level; if some accept their values, these alone."""
    trees, accepting = {}, []
    for stage in STAGE_NAMES:
        config_class = import_stage(stage).config_class
        try:
            trees[stage], _ = translate_settings(tree, config_class.model_fields)
            if set(trees[stage]) <= set(config_class.model_fields):
                config_class.from_dict(trees[stage], stage)
                accepting.append(stage)
            else:
                del trees[stage]
        except ConfigError:
            continue
    return accepting or list(trees)


def refuse_run_of_other_stage(cfg: Config, run_dir: Path, science: Iterable[str]) -> None:
    """Raise ConfigError if a run has science that ``cfg`` has no section for, and its settings fit other stages only."""
    if {name.partition(".")[0] for name in science} <= {*type(cfg).model_fields, "inherited"}:
        return
    stages = list_stages_of_file(run_dir / "config.yaml")
    if stages and not any(isinstance(cfg, import_stage(stage).config_class) for stage in stages):
        raise ConfigError(
            f"{run_dir} is a run of {' or '.join(stages)}: give this run another run.dir, or its CONFIG another name"
        )


def _explain_folder(stage: str, folder: Path) -> str:
    """Return what a folder, or a file of weights, seems to be, and what to type with it."""
    train, setting = f"foveal train {stage}", "teacher" if stage == "distill" else "init"
    names = {path.name for path in itertools.islice(folder.glob("*"), _MOST_FILES)}
    suffixes = {Path(name).suffix.lower() for name in names or [folder.name]}
    if {"science.json", "config.yaml"} <= names:
        (owner, *others) = list_stages_of_file(folder / "config.yaml") or [stage]
        continued = f"foveal train {stage if others else owner} {folder / 'config.yaml'}"
        explanation = f"is the directory of a run: to continue it, type {continued}"
        if (folder / "export").is_dir():
            explanation += f"; to start from its weights, {train} CONFIG {setting}={folder / 'export'}"
    elif "card.json" in names or suffixes & set(_WEIGHTS):
        explanation = f"holds weights: type {train} CONFIG {setting}={folder}"
    elif "manifest.json" in names:
        explanation = f"is a folder of shards: type {train} CONFIG data.path={folder}, or write a config for it by foveal init {stage} --data {folder}"
    elif ".tar" in suffixes:
        explanation = f"holds tar shards without an index: type foveal data index {folder} first"
    elif yamls := sorted(name for name in names if name.endswith(YAML_SUFFIXES)):
        explanation = f"is a folder: give one of its files, such as {folder / yamls[0]}"
    elif any(path.suffix.lower() in _IMAGES for path in itertools.islice(folder.rglob("*"), _MOST_FILES)):
        explanation = f"holds images: pack them by foveal data pack folder {folder} --out data/{folder.name}"
    else:
        explanation = f"is a folder: give a YAML file, or one of {_join(list_configs(stage))}"
    return f"{folder} {explanation}"


def _wrong_stage(config: str, stage: str, stages: list[str]) -> str:
    commands = " or ".join(f"foveal train {other} {config}" for other in stages)
    return f"{config} is a config of {' or '.join(stages)}, not of {stage}: type {commands}"


def _join(names: dict[str, Path]) -> str:
    return ", ".join(names)
