"""What a run was made from: data sets, and models with their own inputs. In ``inputs.json`` of a run, and in cards.

In JSON the inputs of ancestors are a table: what a teacher and an initial encoder have in common is written once, and a
chain of stages grows by a row a stage.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from foveal.atomic import read_json, write_json
from foveal.errors import CheckpointError

_FILE = "inputs.json"


@dataclass(frozen=True)
class DatasetInput:
    """A split of a data set.

    path: absolute, or a URL, without secrets. digest: ``Dataset.samples_digest``. num_used: images in an epoch or an
    evaluation, repeated ones counted.
    """

    role: Literal["training", "evaluation"]
    name: str
    path: str
    split: str
    digest: str
    num_images: int
    num_used: int
    num_classes: int = 0


@dataclass(frozen=True)
class ModelInput:
    """A model that a run starts from, learns from, or goes on with.

    role: ``init``, ``teacher``, ``fork``, or the name of a comparison's arm after ``arm.``. path: absolute, of an export,
    of weights of others, or of a fork's source run. sha256: of the weights; of a fork, of its checkpoint's checksums.
    stage: the one that made it, ``foreign`` for weights of others. inputs: what it was made from; None: not recorded.
    results: the first metrics of its card that were measured on images that no step has seen.
    """

    role: str
    path: str
    sha256: str
    stage: str
    step: int
    inputs: "RunInputs | None" = None
    results: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class RunInputs:
    """The data sets and models of a run. run: absolute path of its directory."""

    run: str
    stage: str
    datasets: tuple[DatasetInput, ...] = ()
    models: tuple[ModelInput, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the inputs as JSON has them; ``inputs_from_dict`` reads them."""
        table = _AncestorTable()
        models = [_encode_model(model, table.add(model.inputs)) for model in self.models]
        record = {"run": self.run, "stage": self.stage, "datasets": list(map(asdict, self.datasets)), "models": models}
        return record | ({"ancestors": table.to_dict()} if table.runs else {})

    def iter_ancestors(self) -> Iterator[tuple[ModelInput, tuple[str, ...]]]:
        """Yield every model of the lineage once, with the roles that lead to it, nearest first."""
        pending, seen = [(model, (model.role,)) for model in self.models], set[tuple[str, str, str]]()
        while pending:
            level, pending = pending, []
            for model, roles in level:
                if (key := (model.role, model.sha256, model.path)) in seen:
                    continue
                seen.add(key)
                yield model, roles
                above = () if model.inputs is None else model.inputs.models
                pending += [(source, (*roles, source.role)) for source in above]


def describe_roles(roles: Sequence[str]) -> str:
    """Return in words what a model is, by the roles that lead to it, the nearest first: "teacher of the init"."""
    words = {"fork": "forked run"}
    return " of the ".join(words.get(role, role.replace("arm.", "arm ", 1)) for role in reversed(roles))


class _AncestorTable:
    """The inputs of ancestors, each once; a row refers to earlier rows only."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self._datasets: dict[DatasetInput, int] = {}
        self._numbers: dict[str, int] = {}  # by a row's JSON
        self._added: dict[int, int] = {}  # by the id of an object, all of which the root of the tree keeps

    def add(self, inputs: RunInputs | None) -> int | None:
        """Return the number of the row of some inputs, after adding it with all before it; None for None."""
        pending = [] if inputs is None else [inputs]
        while pending:  # a stack: forks of forks may be deeper than Python's recursion
            run = pending[-1]
            missing = [m.inputs for m in run.models if m.inputs is not None and id(m.inputs) not in self._added]
            if id(run) not in self._added and not missing:
                self._added[id(run)] = self._add_row(run)
            pending += missing
            if not missing:
                pending.pop()
        return None if inputs is None else self._added[id(inputs)]

    def to_dict(self) -> dict[str, Any]:
        return {"datasets": list(map(asdict, self._datasets)), "runs": self.runs}

    def _add_row(self, inputs: RunInputs) -> int:
        numbers = [self._datasets.setdefault(dataset, len(self._datasets)) for dataset in inputs.datasets]
        models = [_encode_model(m, None if m.inputs is None else self._added[id(m.inputs)]) for m in inputs.models]
        row = {"run": inputs.run, "stage": inputs.stage, "datasets": numbers, "models": models}
        number = self._numbers.setdefault(json.dumps(row), len(self.runs))
        if number == len(self.runs):
            self.runs.append(row)
        return number


def _encode_model(model: ModelInput, row: int | None) -> dict[str, Any]:
    names = ("role", "path", "sha256", "stage", "step")
    return {name: getattr(model, name) for name in names} | {"inputs": row, "results": dict(model.results)}


_Number = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class _StoredModel:
    role: str
    path: str
    sha256: str
    stage: str
    step: int
    inputs: _Number | None = None
    results: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _StoredRun:
    run: str
    stage: str
    datasets: tuple[_Number, ...] = ()
    models: tuple[_StoredModel, ...] = ()


@dataclass(frozen=True)
class _StoredAncestors:
    datasets: tuple[DatasetInput, ...] = ()
    runs: tuple[_StoredRun, ...] = ()


@dataclass(frozen=True)
class _StoredInputs:
    run: str
    stage: str
    datasets: tuple[DatasetInput, ...] = ()
    models: tuple[_StoredModel, ...] = ()
    ancestors: _StoredAncestors = _StoredAncestors()


_ADAPTER = TypeAdapter(_StoredInputs)


def inputs_from_dict(record: Mapping[str, Any], source: str) -> RunInputs | None:
    """Return recorded inputs; None for an empty record: its version recorded none.

    Raises: CheckpointError, naming ``source``, for a damaged record.
    """
    if not record:
        return None
    try:
        stored = _ADAPTER.validate_python(dict(record))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"]))
        raise CheckpointError(f"{source}: its inputs are not as foveal wrote them ({place}: {detail['msg']})") from None
    ancestors: list[RunInputs] = []
    try:
        for row in stored.ancestors.runs:
            datasets = tuple(stored.ancestors.datasets[number] for number in row.datasets)
            ancestors.append(RunInputs(row.run, row.stage, datasets, _decode_models(row.models, ancestors)))
        return RunInputs(stored.run, stored.stage, stored.datasets, _decode_models(stored.models, ancestors))
    except IndexError:
        raise CheckpointError(
            f"{source}: its inputs are not as foveal wrote them (they refer to a row that is not there)"
        ) from None


def _decode_models(models: Sequence[_StoredModel], ancestors: Sequence[RunInputs]) -> tuple[ModelInput, ...]:
    return tuple(
        ModelInput(
            m.role, m.path, m.sha256, m.stage, m.step, None if m.inputs is None else ancestors[m.inputs], m.results
        )
        for m in models
    )


def write_inputs(run_dir: Path, inputs: RunInputs) -> None:
    """Record the inputs of a run in its directory."""
    write_json(run_dir / _FILE, inputs.to_dict())


def read_inputs(run_dir: Path) -> RunInputs | None:
    """Return the inputs of a run; None if its version recorded none. Raises: CheckpointError, OSError."""
    file = run_dir / _FILE
    return inputs_from_dict(read_json(file), str(file)) if file.exists() else None
