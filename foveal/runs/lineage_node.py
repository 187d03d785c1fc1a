"""The lineage of a model as a tree of plain data: what it was made from, back to the data sets."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from foveal.runs.inputs import DatasetInput

# How a node is known: by recorded inputs; by the settings and digests of its card or run; by a digest alone.
Evidence = Literal["recorded", "settings", "digest"]


@dataclass(frozen=True)
class LineageNode:
    """A model, or a run before its first export, with what it was made from.

    role: what the node below it uses it as (``init``, ``teacher``, ``fork``, ``arm.<name>``); "" at the root. stage:
    ``foreign`` for weights of others, "" if not recorded. step: None of a run. sha256: of the weights; of a fork's source, of
    the checkpoint's checksums. path: of the export or weights; of a fork's source, of its run. run: directory of the run
    that made it. What is not known is "". datasets: one whose name is "" is known by its digest. exports: of a run that
    wrote several. gaps: sentences on what is missing. is_repeated: the same model is a node before this one, which has
    its sources.
    """

    role: str = ""
    stage: str = ""
    step: int | None = None
    sha256: str = ""
    path: str = ""
    run: str = ""
    results: Mapping[str, float] = field(default_factory=dict)
    datasets: tuple[DatasetInput, ...] = ()
    models: tuple["LineageNode", ...] = ()
    exports: tuple["LineageNode", ...] = ()
    evidence: Evidence = "recorded"
    gaps: tuple[str, ...] = ()
    is_repeated: bool = False

    @property
    def name(self) -> str:
        """The name of its run; of weights of others, of their file or folder."""
        return PurePath(self.run or self.path).name

    def walk(self) -> Iterator["LineageNode"]:
        """Yield this node, then its sources, each with its own."""
        yield self
        for source in self.models:
            yield from source.walk()

    def list_gaps(self) -> list[str]:
        """Return the sentences on what is missing, of the whole tree."""
        return [gap for node in self.walk() for gap in node.gaps]

    def to_dict(self) -> dict[str, Any]:
        """Return the tree as JSON has it."""
        own = {name: getattr(self, name) for name in ("role", "stage", "name", "step", "sha256", "path", "run")}
        return own | {
            "results": dict(self.results),
            "evidence": self.evidence,
            "gaps": list(self.gaps),
            "is_repeated": self.is_repeated,
            "datasets": [asdict(dataset) for dataset in self.datasets],
            "models": [source.to_dict() for source in self.models],
            "exports": [export.to_dict() for export in self.exports],
        }
