"""Names that foveal 0.1 gave to settings, to their values and to metrics, and the names since 0.2.

Settings of a user (YAML, overrides, pipelines) may have the old names until 0.3. What a run of 0.1 has written (science,
scores, rows of metrics) is translated by every later version.
"""

import copy
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

from foveal import __version__
from foveal.errors import ConfigError

# Settings and sections by dotted name; ``*`` is an index into a list.
SETTINGS: dict[str, str] = {
    "batch.images": "batch.global_size",
    "batch.at_once": "batch.max_micro_size",
    "data.ahead": "data.prefetch_batches",
    "data.labels": "task",
    "data.max_bad": "data.max_bad_fraction",
    "data.threads": "data.workers",
    "data.patience_seconds": "data.stall_timeout_seconds",
    "data.per_class": "data.samples_per_class",
    "data.crop_ratio": "data.eval_crop_ratio",
    "data.val_size": "data.eval_size",
    "data.mix.*.share": "data.mix.*.fraction",
    "data.cache.gigabytes": "data.cache.max_gigabytes",
    "data.augment.flip": "data.augment.hflip",
    "data.augment.operations": "data.augment.rand_augment.ops",
    "data.augment.magnitude": "data.augment.rand_augment.magnitude",
    "data.augment.magnitude_std": "data.augment.rand_augment.magnitude_std",
    "engine.recompute": "engine.activation_checkpointing",
    "engine.matmul": "engine.float32_matmul_precision",
    "optim.kind": "optim.name",
    "optim.floor_lr": "optim.min_lr",
    "optim.clip": "optim.max_grad_norm",
    "recovery.after": "recovery.rollback_after_skips",
    "recovery.rollbacks": "recovery.max_rollbacks",
    "checkpoint.overlap": "checkpoint.async_save",
    "checkpoint.gigabytes": "checkpoint.max_gigabytes",
    "run.restarts": "run.max_attempts_without_progress",
    "run.stop_at": "run.stop_at_step",
    "log.pictures_every": "log.images_every",
    "tracking.patience_seconds": "tracking.flush_timeout_seconds",
    "masking": "mask_strategy",
    "mask_block": "mask_block_size",
    "image_weight": "image_loss_weight",
    "average": "ema_decay",
    "lesson": "method",
    "lesson_cache": "teacher_cache",
    "lesson_cache.gigabytes": "teacher_cache.max_gigabytes",
    "frozen": "freeze_encoder",
    "erase": "random_erasing",
    "cutmix_share": "mixup_switch_prob",
    "folds": "cross_validation",
    "probe.gigabytes": "probe.max_gigabytes",
    "adversarial.kind": "adversarial.attack",
    "adversarial.step": "adversarial.step_size",
    "adversarial.iterations": "adversarial.steps",
    "adversarial.split_norms": "adversarial.separate_batchnorm",
}
_OLD_NAMES = {new: old for old, new in SETTINGS.items()}
# Values, by the new name of their setting.
VALUES: dict[str, dict[str, str]] = {
    "task": {"class": "classification", "classes": "multilabel", "mask": "segmentation", "boxes": "detection"},
    "target": {"latents": "features"},
    "image_target": {"averaged": "ema", "own": "online"},
}
# Settings that a stage no longer has, by new name: the only value that such a stage accepted.
DROPPED: dict[str, str] = {"task": "classification"}
# Metrics without their prefix (``val_``, or ``NAME/`` of a student) and without the suffix of an aggregate (``_mean``).
METRICS: dict[str, str] = {
    "applied": "step_applied",
    "pixels": "pixel_accuracy",
    "map": "mAP",
    "map_50": "mAP_50",
    "map_75": "mAP_75",
    "agreement": "teacher_agreement",
}
_METRIC_SETTING = "early_stopping.metric"
_METRIC = re.compile(
    rf"(?P<prefix>(?:train|val|holdout|fold)_|.+/(?=agreement))?(?P<name>{'|'.join(METRICS)})(?P<suffix>_(?:mean|std|lowest|highest))?"
)
_LAST_VERSION_WITH_OLD_NAMES = (0, 2)
Path = tuple[str | int, ...]


def translate_settings(
    tree: dict[str, Any], sections: Container[str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return nested settings under their new names, and the new by the old names in use.

    ``sections``: the first parts of the names that the stage has; None: of an unknown stage. Raises: ConfigError for a
    setting under both names, or one that this stage never had a use for.
    """
    translated, renamed = copy.deepcopy(tree), {}
    for path, value in list(_iter_leaves(tree)):
        new_path = _rename_path(path)
        new_value = _translate_value(new_path, value)
        if (new_path, new_value) == (path, value):
            continue
        old, new = (".".join(map(str, names)) for names in (path, new_path))
        if new_path != path:
            if _exists(tree, new_path):
                raise ConfigError(f"{old} and {new} are one setting: leave out {old}, its name before 0.2")
            _remove(translated, path)
        if sections is not None and new in DROPPED and new not in sections:
            if new_value != DROPPED[new]:
                raise ConfigError(
                    f"{old}={value} is for fine-tuning; this stage learns from no such label: leave it out"
                )
            renamed[old] = "no setting of this stage"
            continue
        renamed[old if new_path != path else f"{old}={value}"] = new if new_path != path else f"{new}={new_value}"
        _set(translated, new_path, new_value)
    return translated, renamed


def translate_override(name: str, value: Any, sections: Container[str]) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """Return the assignments (dotted name, value) that one means under new names, and the renames in use.

    A section's inner settings are one assignment, like the section, but for those that are in another section now.
    """
    nested = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    translated, renamed = translate_settings(nested, sections)
    if not renamed:
        return [(name, value)], {}
    new_name = translate_setting(name, None)[0]
    outside = [(key, inner) for key, inner in flatten(translated) if not f"{key}.".startswith(f"{new_name}.")]
    moved = [(key, inner) for key, inner in outside if inner != {}]
    kept: Any = translated
    for part in new_name.split("."):
        if not isinstance(kept, dict) or part not in kept:
            return moved, renamed
        kept = kept[part]
    return [(new_name, kept), *moved], renamed


def translate_setting(name: str, value: Any) -> tuple[str, Any]:
    """Return the new name and value of one setting, given by its dotted name; a section's inner names stay."""
    path = _rename_path(_split(name))
    return ".".join(map(str, path)), _translate_value(path, value)


def translate_science(saved: Mapping[str, Any], current: Container[str]) -> dict[str, Any]:
    """Return a run's stored science under its new names, without what the stage no longer has among ``current``."""
    translated = dict(translate_setting(name, value) for name, value in saved.items())
    return {
        name: value for name, value in translated.items() if name in current or (name, value) not in DROPPED.items()
    }


def restore_names(science: Mapping[str, Any]) -> dict[str, Any]:
    """Return science under the names of 0.1, for the keys of caches that 0.1 may have filled."""
    restored = {}
    for name, value in science.items():
        old_values = {new: old for old, new in VALUES.get(name, {}).items()}
        old_name = ".".join(map(str, _rename_path(_split(name), _OLD_NAMES)))
        restored[old_name] = old_values.get(value, value) if isinstance(value, str) else value
    return restored


def translate_metric(name: str) -> str:
    """Return the new name of a logged metric."""
    match = _METRIC.fullmatch(name)
    return name if match is None else f"{match['prefix'] or ''}{METRICS[match['name']]}{match['suffix'] or ''}"


def translate_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics under their new names."""
    return {translate_metric(name): value for name, value in row.items()}


def list_renames(renamed: Mapping[str, str]) -> str:
    """Return the new name of each old one, as words of a sentence."""
    return ", ".join(f"{old} is now {new}" for old, new in renamed.items())


def describe_renames(source: str, renamed: Mapping[str, str]) -> str:
    """Return the sentence for a user whose settings have old names. Raises: ConfigError with it, from 0.3 on."""
    sentence = (
        f"{source}: names of foveal 0.1: {list_renames(renamed)}; `foveal config upgrade FILE` rewrites a YAML file"
    )
    if tuple(map(int, __version__.split(".")[:2])) > _LAST_VERSION_WITH_OLD_NAMES:
        raise ConfigError(sentence)
    return sentence


def flatten(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (dotted name, value) of everything that is no section in nested settings."""
    return [(".".join(map(str, path)), value) for path, value in _iter_leaves(tree)]


def _iter_leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and value of everything that is no section; an empty section and a list of values are values."""
    if isinstance(tree, dict) and tree:
        for key, inner in tree.items():
            yield from _iter_leaves(inner, (*path, str(key)))
    elif isinstance(tree, list | tuple) and any(isinstance(inner, dict) for inner in tree):
        for number, inner in enumerate(tree):
            yield from _iter_leaves(inner, (*path, number))
    elif path:
        yield path, tree


def _split(name: str) -> Path:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _rename_path(path: Path, names: Mapping[str, str] = SETTINGS) -> Path:
    """Return the path under the other name; the longest row of the table that the path begins with applies."""
    pattern = ["*" if isinstance(part, int) else part for part in path]
    for length in range(len(path), 0, -1):
        new_name = names.get(".".join(pattern[:length]))
        if new_name is not None:
            numbers = iter([part for part in path[:length] if isinstance(part, int)])
            renamed = tuple(next(numbers) if part == "*" else part for part in new_name.split("."))
            return (*renamed, *path[length:])
    return path


def _translate_value(new_path: Path, value: Any) -> Any:
    name = ".".join(map(str, new_path))
    if name == _METRIC_SETTING and isinstance(value, str):
        return translate_metric(value)
    return VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def _exists(tree: Any, path: Path) -> bool:
    part: Any
    for part in path:
        if (isinstance(tree, dict) and part in tree) or (
            isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree)
        ):
            tree = tree[part]
        else:
            return False
    return True


def _remove(tree: Any, path: Path) -> None:
    """Remove a value, and the sections that have become empty by it."""
    parents = [tree]
    for part in path[:-1]:
        parents.append(parents[-1][part])
    del parents[-1][path[-1]]
    if not parents[-1] and len(path) > 1:
        _remove(tree, path[:-1])


def _set(tree: Any, path: Path, value: Any) -> None:
    section: Any = tree
    for part in path[:-1]:
        if isinstance(part, str) and section.get(part) is None:
            section[part] = {}
        section = section[part]
        if type(section) not in (dict, list):
            raise ConfigError(f"'{'.'.join(map(str, path))}': '{part}' is a value, not a section")
    section[path[-1]] = value
