"""Who may import whom. The table is the architecture; a module that has no row may import nothing of ours."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from house import PRODUCT, ROOT, STAGES, Import, imports, is_first_party_module, module_of, python_files, syntax
from rooms import ROOMS, STAGE_CONFIGS

# A model knows neither the machine nor the process that it runs in.
MODELS_DO_WITHOUT = {"os", "socket", "subprocess", "multiprocessing", "pathlib"}
# Sentences for the user that name a command of Slurm.
SLURM_IN_MESSAGES = {("foveal.forecast.slurm_limits", "none, scontrol lists no partitions")}
DISTRIBUTION_OF = {"PIL": "pillow", "pydantic_core": "pydantic", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def _within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def _room_of(module: str) -> str:
    return max((room for room in ROOMS if _within(module, room)), key=len)


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in PRODUCT


def _may(module: str, name: str) -> bool:
    room = _room_of(module)
    rooms, libraries = ROOMS[room]
    if _within(name, "torch.distributed"):
        return "torch.distributed" in libraries
    if not _is_ours(name):
        return name.partition(".")[0] in {*libraries, *sys.stdlib_module_names}
    inside = room != "foveal" and _room_of(name) == room
    return name == "foveal" or inside or any(_within(name, other) for other in rooms)  # the root is the version only


def _lines() -> Iterator[tuple[Path, Import]]:
    return ((file, imported) for file in python_files(*PRODUCT) for imported in imports(syntax(file)))


def _problems(module: str, lines: list[Import]) -> list[str]:
    return [f"line {line.line}: {module} may not import {line.name}" for line in lines if not _may(module, line.name)]


@pytest.mark.parametrize("file", python_files(*PRODUCT), ids=module_of)
def test_doors_open_one_way(file: Path) -> None:
    assert not _problems(module_of(file), list(imports(syntax(file))))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("foveal.data.loader", "import torch.distributed as dist"),
        ("foveal.data.loader", "from torch import distributed"),
        ("foveal.data.loader", "import torch\ntorch.distributed.barrier()"),
        ("foveal.data.loader", "from foveal.models import vit"),
        ("foveal.data.loader", "from foveal.data.pack import pack_digits"),
        ("foveal.models.vit", "def late():\n    import deepspeed"),
        ("foveal.training.loop", "from accelerate import Accelerator"),
        ("foveal.training.run", "import mlflow.tracking"),
        ("pretrain.run", "from distill.config import DistillConfig"),
        ("pretrain.run", "import submitit"),
        ("foveal.training.plan", "import pretrain.config"),
        ("foveal.brand_new", "from foveal.config import Config"),
        ("foveal.errors", "import torch"),
        ("foveal.data.loader", "from . import order"),
    ],
)
def test_a_wrong_door_is_seen(module: str, line: str) -> None:
    assert _problems(module, list(imports(ast.parse(line))))


def test_every_row_has_a_room() -> None:
    empty = [room for room in ROOMS if not (ROOT / room.replace(".", "/")).is_dir() and not is_first_party_module(room)]
    assert not empty, f"rows of the table without a module: {empty}"


def test_rooms_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file, imported in _lines():
        if _is_ours(imported.name):
            here, there = _room_of(module_of(file)), _room_of(imported.name)
            if here != there and file != ROOT / "foveal" / "__init__.py":  # the front door opens at a call
                graph.setdefault(here, set()).add(there)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_every_library_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [name for extra in ("detection", "fast", "hf") for name in project["optional-dependencies"][extra]]
    declared = {requirement.split(">")[0].lower() for requirement in [*project["dependencies"], *optional]}
    brought = {library.partition(".")[0] for _, libraries in ROOMS.values() for library in libraries}
    missing = {name for name in brought if DISTRIBUTION_OF.get(name, name).lower() not in declared}
    assert not missing, f"imported, but not among the dependencies of pyproject.toml: {missing}"


def test_models_know_no_machine() -> None:
    files = python_files("foveal/models")
    assert not [
        f"{module_of(file)}: {imported.name}"
        for file in files
        for imported in imports(syntax(file))
        if imported.name.partition(".")[0] in MODELS_DO_WITHOUT
    ]


def test_the_environment_is_read_by_few() -> None:
    """Which launcher is the business of foveal/distributed and foveal/engines, which job that of foveal/slurm.py.

    A path may name variables. MLflow reads one when it is imported, and is told by foveal/tracking. What the
    environment has of secrets is redacted.
    """
    readers = {
        module_of(file)
        for file in python_files("foveal", *STAGES)
        for node in ast.walk(syntax(file))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.putenv"}
    }
    assert not {
        module
        for module in readers - {"foveal.interrupt", "foveal.tracking", "foveal.redact", "foveal.slurm"}
        if not module.startswith(("foveal.distributed.", "foveal.engines."))
    }


def _names_of_slurm(tree: ast.Module) -> list[str]:
    """The strings of code that name a variable or a command of Slurm; a docstring is no code."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
        and re.search(r"\bSLURMD?_|\b(scontrol|squeue|sacct|scancel|slurmstepd)\b", node.value)
    ]


def test_slurm_is_known_in_one_file() -> None:
    known = {
        (module_of(file), text)
        for file in python_files(*PRODUCT)
        if module_of(file) != "foveal.slurm"
        for text in _names_of_slurm(syntax(file))
    }
    assert known == SLURM_IN_MESSAGES


@pytest.mark.parametrize(
    "line", ['os.environ["SLURM_JOB_ID"]', 'f"SLURM_ARRAY_TASK_{name}"', 'call(["scontrol", "show", "job"])']
)
def test_a_second_reader_of_slurm_is_seen(line: str) -> None:
    assert _names_of_slurm(ast.parse(line))
    assert not _names_of_slurm(ast.parse('def read():\n    """Read SLURM_JOB_ID; see scontrol."""'))


def test_scripts_shadow_nothing() -> None:
    """``accelerate launch finetune/run.py`` puts finetune/ first on the path of every library in the process."""
    names = {file.stem for file in python_files(*STAGES, "slurm")} - {"__init__"}
    assert {"run", "config", "objective"} <= names
    assert not names & sys.stdlib_module_names
    path = [
        entry for entry in sys.path if Path(entry).resolve() not in {ROOT / folder for folder in (*STAGES, "slurm")}
    ]
    assert not [name for name in names if PathFinder.find_spec(name, path) is not None]
    assert PathFinder.find_spec("numpy", path) is not None


HEAVY = {"torch", "timm", "numpy", "deepspeed", "accelerate", "mlflow", "submitit", "transformers"}


def _words_printed(code: str) -> list[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def test_settings_are_read_without_the_heavy_libraries() -> None:
    """They take seconds to import, which nobody should wait for to be told of a typo."""
    loaded = _words_printed(f"import sys, {', '.join(STAGE_CONFIGS)}; print(*sys.modules)")
    assert set(STAGE_CONFIGS) <= set(loaded)
    assert not HEAVY & set(loaded)


_ANSWERS = """
import contextlib, os, runpy, sys
sys.stdout = open(os.devnull, "w")
codes = []
for module, *words in {starts}:
    sys.argv = [module, *words]
    try: runpy.run_module(module, run_name="__main__")
    except SystemExit as end: codes.append(end.code)
print(*codes, *sys.modules, file=sys.__stdout__)
"""


def test_typos_and_help_are_answered_without_the_heavy_libraries() -> None:
    starts = [(f"{stage}.run", *words) for stage in STAGES for words in (("digits", "optim.lrr=1"), ("--help",))]
    starts += [("foveal.cli", *words) for words in (["--help"], ["train", "distill", "--help"], ["config", "list"])]
    printed = _words_printed(_ANSWERS.format(starts=starts))
    assert printed[: len(starts)] == ["2", "0", "2", "0", "2", "0", "0", "0", "0"]
    assert not HEAVY & set(printed)


UNUSED_BY_A_START = {"mlflow", "pandas", "pyarrow", "scipy", "sklearn", "submitit", "transformers", "webdataset"}


def test_a_start_imports_no_library_that_its_first_step_does_not_need() -> None:
    """MLflow alone, which DeepSpeed's autotuner imports, takes every rank two seconds; its uploader imports it later."""
    stages = ", ".join(f"{stage}.train" for stage in STAGES)
    loaded = _words_printed(
        f"import sys, {stages}, foveal.training.launch, foveal.engines.accelerate, foveal.engines.deepspeed as engine; "
        "engine.import_deepspeed(); print(*sys.modules)"
    )
    assert {"deepspeed", "accelerate", "timm"} <= set(loaded)
    assert not UNUSED_BY_A_START & set(loaded)
