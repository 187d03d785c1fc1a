"""What a check finds."""

from dataclasses import dataclass, field
from typing import Any, Literal

from foveal.errors import BadNode, FovealError, Unreachable
from foveal.redact import redact

# node: this node should not train; config: wrong here, and if it is wrong everywhere, the settings are; reach: ranks or
# storage do not answer, and if that is so everywhere, it is no node's fault in particular; note: beware.
Kind = Literal["node", "config", "reach", "note"]


def kind_of(error: FovealError) -> Kind:
    """What a mistake says of the node that met it: storage that did not answer may answer the next start."""
    if isinstance(error, BadNode):
        return "node"
    return "reach" if isinstance(error, Unreachable) else "config"


@dataclass
class Report:
    """One rank's: facts for the table and for comparison, and faults as (kind, sentence)."""

    node: str
    rank: int
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[tuple[Kind, str]] = field(default_factory=list)

    def fault(self, kind: Kind, sentence: str) -> None:
        """One problem, in a sentence, which loses the secrets in it."""
        self.faults.append((kind, redact(sentence)))

    def tree(self) -> dict[str, Any]:
        """Plain data."""
        return {"node": self.node, "rank": self.rank, "facts": self.facts, "faults": self.faults}

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "Report":
        """The reverse of ``tree``."""
        return cls(tree["node"], tree["rank"], tree["facts"], [(kind, said) for kind, said in tree["faults"]])
