"""What a run was made from: data sets, and models with their own inputs. In ``inputs.json`` of a run, and in cards."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from foveal.atomic import read_json, write_json
from foveal.errors import CheckpointError

_FILE = "inputs.json"


@dataclass(frozen=True)
class DatasetInput:
    """A split of a data set. path: as in the settings, without secrets. num_used: images in an epoch or an evaluation."""

    role: Literal["training", "evaluation"]
    name: str
    path: str
    split: str
    digest: str  # ``Dataset.samples_digest``
    num_images: int
    num_used: int
    num_classes: int = 0


@dataclass(frozen=True)
class ModelInput:
    """A model that a run starts from, learns from, or goes on with.

    role: ``init``, ``teacher``, ``fork``, or the name of a comparison's arm after ``arm.``. path: absolute, of an export,
    of weights of others, or of a fork's source run. sha256: of the weights; of a fork, of its checkpoint's checksums.
    stage: the one that made it, ``foreign`` for weights of others. inputs: what it was made from; None: not recorded.
    """

    role: str
    path: str
    sha256: str
    stage: str
    step: int
    inputs: "RunInputs | None" = None


@dataclass(frozen=True)
class RunInputs:
    """The data sets and models of a run. run: absolute path of its directory."""

    run: str
    stage: str
    datasets: tuple[DatasetInput, ...] = ()
    models: tuple[ModelInput, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the inputs as JSON has them."""
        return asdict(self)


_ADAPTER = TypeAdapter(RunInputs)


def inputs_from_dict(record: Mapping[str, Any], source: str) -> RunInputs | None:
    """Return recorded inputs; None for an empty record: its version recorded none.

    Raises: CheckpointError, naming ``source``, for a damaged record.
    """
    if not record:
        return None
    try:
        return _ADAPTER.validate_python(dict(record))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"]))
        raise CheckpointError(f"{source}: its inputs are not as foveal wrote them ({place}: {detail['msg']})") from None


def write_inputs(run_dir: Path, inputs: RunInputs) -> None:
    """Record the inputs of a run in its directory."""
    write_json(run_dir / _FILE, inputs.to_dict())


def read_inputs(run_dir: Path) -> RunInputs | None:
    """Return the inputs of a run; None if its version recorded none. Raises: CheckpointError, OSError."""
    file = run_dir / _FILE
    return inputs_from_dict(read_json(file), str(file)) if file.exists() else None
