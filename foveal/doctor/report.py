"""Reports of the checks: facts and faults of one rank."""

from dataclasses import dataclass, field
from typing import Any, Literal

from foveal.errors import BadNodeError, FovealError, StorageUnreachableError, TrainingHungError
from foveal.redact import redact

# node: this node should not train; config: an error of this node, or of the settings if all nodes have it; reach: ranks
# or storage do not answer, which is the fault of no single node if all nodes have it; note: a warning.
FaultKind = Literal["node", "config", "reach", "note"]


def classify_error(error: FovealError) -> FaultKind:
    """Return the fault kind of an error on a node. Unreachable storage or ranks may answer at the next start."""
    if isinstance(error, BadNodeError):
        return "node"
    return "reach" if isinstance(error, StorageUnreachableError | TrainingHungError) else "config"


@dataclass
class RankReport:
    """The report of a rank: facts for the table and for comparison, and faults as (kind, sentence)."""

    node: str
    rank: int
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[tuple[FaultKind, str]] = field(default_factory=list)

    def add_fault(self, kind: FaultKind, sentence: str) -> None:
        """Add a fault, with secrets in the sentence redacted."""
        self.faults.append((kind, redact(sentence)))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"node": self.node, "rank": self.rank, "facts": self.facts, "faults": self.faults}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RankReport":
        """Return the report of ``to_dict``'s data."""
        return cls(data["node"], data["rank"], data["facts"], [(kind, sentence) for kind, sentence in data["faults"]])
