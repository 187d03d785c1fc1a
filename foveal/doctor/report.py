"""What a check finds."""

from dataclasses import dataclass, field
from typing import Any, Literal

from foveal.errors import BadNodeError, FovealError, StorageUnreachableError
from foveal.redact import redact

# node: this node should not train; config: wrong here, and if it is wrong everywhere, the settings are; reach: ranks or
# storage do not answer, and if that is so everywhere, it is no node's fault in particular; note: beware.
FaultKind = Literal["node", "config", "reach", "note"]


def classify_error(error: FovealError) -> FaultKind:
    """What a mistake says of the node that met it: storage that did not answer may answer the next start."""
    if isinstance(error, BadNodeError):
        return "node"
    return "reach" if isinstance(error, StorageUnreachableError) else "config"


@dataclass
class RankReport:
    """One rank's: facts for the table and for comparison, and faults as (kind, sentence)."""

    node: str
    rank: int
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[tuple[FaultKind, str]] = field(default_factory=list)

    def add_fault(self, kind: FaultKind, sentence: str) -> None:
        """One problem, in a sentence, which loses the secrets in it."""
        self.faults.append((kind, redact(sentence)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"node": self.node, "rank": self.rank, "facts": self.facts, "faults": self.faults}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RankReport":
        """The reverse of ``tree``."""
        return cls(data["node"], data["rank"], data["facts"], [(kind, said) for kind, said in data["faults"]])
