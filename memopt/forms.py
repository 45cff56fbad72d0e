"""Other forms in which the backward may hold a value, offered to the planner.

To offer a form is to put the nodes that make it, and that make the value of it again, behind the
value in the joint graph, where nothing reads them. So the planner knows their bytes and seconds
as it does those of any node, and the partition takes along those that it has chosen.
"""

from collections.abc import Iterable
from typing import ClassVar, Protocol

from torch import fx

from memopt.device import DeviceSpec
from memopt.graph import backward_nodes, source_line
from memopt.joint import ENCODES
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind


class Form(Protocol):
    """A way to hold values; configured and switched by name, as a pass is.

    Attributes:
        kind: what becomes of a value, in a word.
        default: whether it is offered where the options do not name it.
        loss: error of a value that comes back, over its norm; 0 where it comes back as it was.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    default: ClassVar[bool]

    @property
    def loss(self) -> float:
        """See the class."""

    def fits(self, node: fx.Node, device: DeviceSpec) -> str | None:
        """Why a value cannot be held so: ``""`` where it can, None where it is not meant to be.

        Args:
            node: the value.
            device: what is planned for; tensors that are traced may be elsewhere.
        """

    def encode(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """Insert what makes the form; the graph is positioned."""

    def decode(self, graph: fx.Graph, encoded: fx.Node, like: fx.Node) -> fx.Node:
        """Insert what makes the value again, as ``like`` is; the graph is positioned."""


def offer(graph: fx.Graph, forms: Iterable[Form], ctx: PassContext, device: DeviceSpec) -> None:
    """Put what makes every form of every value that has one behind the value."""
    late = backward_nodes(graph)
    early = [n for n in graph.nodes if n.op == "call_function" and n not in late]
    for form in forms:
        for node in early:
            reason = form.fits(node, device)
            if reason:
                ctx.remark(form.name, RemarkKind.MISSED, reason, node.name, source_line(node))
            if reason != "":
                continue
            with graph.inserting_before(node.next):
                encoded = form.encode(graph, node)
                decoded = form.decode(graph, encoded, node)
            decoded.meta[ENCODES] = form.kind, form.loss, node.name, encoded.name
