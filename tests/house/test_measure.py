"""A file fits in a head and a function on a screen."""

import ast
from pathlib import Path

import pytest
from house import PRODUCT, ROOT, python_files, syntax

LONGEST_FILE = 350
LONGEST_FUNCTION = 60

# "path" or "path:function", and the reason.
LARGER: dict[str, str] = {
    "foveal/slurm.py": "Slurm's variables, formats and commands stand in one file, so that no second reader of them is written",
    "slurm/submit.py": "one script, which a shell calls by its path: a pipeline file, its submission, its run on one machine",
    "tests/house/rooms.py": "one table; a second file would hide who may import whom",
    "tests/unit/training/test_lease.py": "processes that race for one directory; two files would share every helper",
    "tests/remote/test_mlflow.py": "what one real server, started once, goes through",
}

FILES = python_files(*PRODUCT, "tests", "benchmarks")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_measure(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    lines = len(file.read_text().splitlines())
    large = {name: lines} if lines > LONGEST_FILE else {}
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST_FUNCTION:
                large[f"{name}:{node.name}"] = length
    assert not {place: length for place, length in large.items() if place not in LARGER}


def test_no_exception_outlives_its_reason() -> None:
    places = {str(file.relative_to(ROOT)) for file in FILES}
    assert not [place for place in LARGER if place.partition(":")[0] not in places]
