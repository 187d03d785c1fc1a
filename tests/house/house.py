"""What the tests of the structure look at: the files of the repository and what they import."""

import ast
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "distill", "finetune")
PRODUCT = ("foveal", *STAGES, "slurm")


def python_files(*folders: str) -> list[Path]:
    """The Python files under these folders of the repository."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


@cache
def syntax(file: Path) -> ast.Module:
    """A file's syntax tree, parsed once."""
    return ast.parse(file.read_text(), str(file))


def module_of(file: Path) -> str:
    """``foveal.data.sampling.order`` for foveal/data/sampling/order.py; a package is its __init__."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@dataclass(frozen=True)
class Import:
    """A module that a line imports or names."""

    name: str
    line: int


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every module that is imported at any depth of the file, and every dotted use of torch.distributed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(name, node.lineno) for name in _imported_from(node))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield Import("torch.distributed", node.lineno)


def _imported_from(node: ast.ImportFrom) -> Iterator[str]:
    """``from foveal.data import order`` imports a module, ``from foveal.data import Batch`` does not."""
    package = "." * node.level + (node.module or "")
    for alias in node.names:
        inner = f"{package}.{alias.name}"
        yield inner if is_first_party_module(inner) or inner == "torch.distributed" else package


def is_first_party_module(name: str) -> bool:
    """Whether the repository has a file or a package of that dotted name."""
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def repository_files() -> list[Path]:
    """What git has or would take; skips where this is no git checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout: there is no list of the files that belong to it")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
