"""What the compiler says about its own decisions; ``explain`` prints these."""

import enum
from dataclasses import dataclass


class RemarkKind(enum.Enum):
    """As in LLVM's optimisation remarks."""

    APPLIED = "applied"
    MISSED = "missed"
    ANALYSIS = "analysis"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """One statement about one node.

    Attributes:
        pass_name: who speaks: a pass, or ``"planner"``, ``"pipeline"``, ``"backend"``.
        kind: whether something was done, was not done, or is merely so.
        node: the name of the graph node, or ``""`` for the graph as a whole.
        source: the user's ``file:line``, or ``""`` where it is not known.
        text: the statement and its reason.
    """

    pass_name: str
    kind: RemarkKind
    text: str
    node: str = ""
    source: str = ""

    def to_dict(self) -> dict[str, str]:
        """All fields as strings."""
        return {
            "pass": self.pass_name,
            "kind": self.kind.value,
            "node": self.node,
            "source": self.source,
            "text": self.text,
        }
