"""Versions of libraries in checkpoints and cards."""

import importlib.metadata

import pytest

from foveal.training.provenance import get_library_versions


def test_a_library_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain engine runs without DeepSpeed."""
    find = importlib.metadata.version

    def without_deepspeed(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "version", without_deepspeed)
    versions = get_library_versions()
    assert versions["deepspeed"] == "not installed"
    assert versions["torch"] == find("torch")
