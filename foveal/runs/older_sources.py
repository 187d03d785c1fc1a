"""The sources of a run of a version that recorded no inputs: digests of its science, and paths of its settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foveal.data.format.manifest import read_manifest
from foveal.errors import FovealError
from foveal.runs.card_record import iter_science_models
from foveal.runs.inputs import DatasetInput, ModelInput
from foveal.runs.record import is_run, read_run

# Settings that name a model, by role; those of distillation and fine-tuning have different forms.
_PATH_SETTINGS = {"init": ("init",), "teacher": ("teacher.init", "teacher")}


@dataclass(frozen=True)
class OlderSources:
    """The data sets and models that science and settings state. run: its directory; None: not found."""

    science: Mapping[str, Any]
    run: Path | None

    @cached_property
    def models(self) -> tuple[ModelInput, ...]:
        """The models, whose stage and step are not known; path: "" where no setting states it."""
        return tuple(self._model(role, digest) for role, digest in iter_science_models(self.science))

    @cached_property
    def datasets(self) -> tuple[DatasetInput, ...]:
        """The data sets. One that is still at its path, with the same samples, has a name and a number of images."""
        facts = {
            "training": ("inherited.data", "data.train", "train"),
            "evaluation": ("inherited.val", "data.val", "val"),
        }
        found = [
            self._dataset(role, digest, str(self.science.get(setting, default)), self._settings.get("data.path"))
            for role, (fact, setting, default) in facts.items()
            if isinstance(digest := self.science.get(fact), str)
        ]
        mix = self._settings.get("data.mix") or self.science.get("data.mix") or []
        for number, entry in enumerate(mix):
            digest = self.science.get(f"inherited.data.mix.{number}")
            if isinstance(digest, str) and isinstance(entry, dict):
                split = str(entry.get("split", "train"))
                found.insert(1 + number, self._dataset("training", digest, split, entry.get("path")))
        return tuple(found)

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        if self.run is None:
            return {}
        try:
            return read_run(self.run).settings
        except FovealError:  # damaged; science has the digests
            return {}

    def _model(self, role: str, digest: str) -> ModelInput:
        if role == "fork":
            step = self.science.get("inherited.fork.step", 0)
            return ModelInput(role, str(self.science.get("inherited.fork.run", "")), digest, "", step)
        names = (f"trials.arms.{role.removeprefix('arm.')}",) if role.startswith("arm.") else _PATH_SETTINGS[role]
        stated = next((value for name in names if isinstance(value := self._settings.get(name), str)), None)
        return ModelInput(role, self._resolve(stated) if stated else "", digest, "", 0)

    def _dataset(self, role: Any, digest: str, split: str, path: Any) -> DatasetInput:
        if not isinstance(path, str) or "://" in path:
            return DatasetInput(role, "", path if isinstance(path, str) else "", split, digest, 0, 0)
        folder = self._resolve(path)
        try:
            manifest = read_manifest(Path(folder))
        except (FovealError, OSError):
            return DatasetInput(role, "", folder, split, digest, 0, 0)
        entry = manifest.splits.get(split)
        if entry is None or entry.samples_digest != digest:
            return DatasetInput(role, "", folder, split, digest, 0, 0)
        return DatasetInput(role, manifest.name, folder, split, digest, entry.samples, 0, len(manifest.classes or ()))

    def _resolve(self, stated: str) -> str:
        """Return an absolute path: settings are relative to where the run was started, which its run.dir tells."""
        path = Path(stated).expanduser()
        if path.is_absolute() or self.run is None:
            return str(path.absolute())
        run, setting = self.run.resolve(), Path(str(self._settings.get("run.dir", "")))
        parts = setting.parts
        is_below = not setting.is_absolute() and parts and run.parts[-len(parts) :] == parts
        start = Path(*run.parts[: -len(parts)]) if is_below else Path.cwd()
        return str((start / path).resolve())


def find_run_of_export(folder: Path) -> Path | None:
    """Return the directory of the run that holds an export; None for an export elsewhere."""
    return next((parent for parent in folder.resolve().parents[:3] if is_run(parent)), None)
