"""Compiles a function with one of the passes that fuse: the graph, the result, what is said."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from memopt.backend import compile_graph, read_options
from memopt.record import GraphRecord
from memopt.remarks import Remark, RemarkKind
from tests.references import assert_draws_within_reference_error, assert_equal_in_float64, run

Function = Callable[..., Any]
Draw = Callable[[], Sequence[Tensor]]


class Fused:
    """A function compiled with one pass, on the CPU too.

    Attributes:
        graph: the last graph, after the passes.
        record: what was said of it.
        graphs: how many there were.
    """

    graph: fx.Graph
    record: GraphRecord
    graphs: int = 0

    def __init__(self, function: Function, pass_name: str, *, cpu: bool | None = True) -> None:
        """``cpu`` is the pass's option of that name; None for one that has none."""
        torch._dynamo.reset()
        self.pass_name = pass_name
        own = True if cpu is None else {"cpu": cpu}
        passes = {"chunk_losses": False, "weigh_rows": False, pass_name: own}
        self._config = read_options({"lowering": "eager", "strict": True, "passes": passes})
        self._compiled = torch.compile(function, backend=self._backend)

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        records: list[GraphRecord] = []
        compiled = compile_graph(gm, inputs, self._config, records.append)
        self.graph, (self.record,) = gm.graph, records
        self.graphs += 1
        return compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    @property
    def rewrites(self) -> int:
        """How many operators the pass put in."""
        return self.record.rewrites[self.pass_name]

    def said(self, kind: RemarkKind) -> list[Remark]:
        """Its remarks of one kind."""
        return [r for r in self.record.remarks if r.pass_name == self.pass_name and r.kind is kind]

    def calls(self, operator: Any) -> list[fx.Node]:
        """The nodes that call an operator."""
        return list(self.graph.find_nodes(op="call_function", target=operator))


def assert_is_fused(
    function: Function, draw: Draw, pass_name: str, *, operators: int = 1
) -> Fused:
    """The pass puts so many operators in; results and gradients are as near as eager's."""
    fused = Fused(function, pass_name)

    def sides() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = draw()
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        trained = [t.requires_grad for t in inputs]
        upstream = torch.randn_like(function(*inputs))
        return (
            run(fused, inputs, upstream, trained),
            run(function, wide, upstream.double(), trained),
            run(function, inputs, upstream, trained),
        )

    assert_draws_within_reference_error(sides)
    assert fused.rewrites == operators, fused.record.remarks
    assert not fused.said(RemarkKind.MISSED)
    assert all(remark.source for remark in fused.said(RemarkKind.APPLIED))
    return fused


def assert_is_fused_at_any_length(
    function: Function, draw: Callable[[int], Sequence[Tensor]], pass_name: str, operators: int = 1
) -> None:
    """One graph serves sequences of every length.

    Args:
        function: of what is drawn.
        draw: makes inputs in float64 for a length.
        pass_name: of the pass.
        operators: how many it puts in.
    """
    fused = Fused(function, pass_name)
    for length in (3, 9, 4):
        inputs = draw(length)
        trained = [t.requires_grad for t in inputs]

        def marked(*leaves: Tensor) -> Any:
            for leaf in leaves:
                if leaf.shape[1:2] == (length,):  # noqa: B023  # called in this round
                    torch._dynamo.mark_dynamic(leaf, 1)
            return fused(*leaves)

        sides = (run(f, inputs, trained=trained) for f in (marked, function))
        assert_equal_in_float64(*sides)
    assert fused.graphs == 1
    assert fused.rewrites == operators


def assert_is_left(function: Function, inputs: Sequence[Tensor], pass_name: str, why: str) -> None:
    """The pass leaves the graph as it is, says why, and the numbers are eager's.

    Args:
        function: of the inputs.
        inputs: what it is called with.
        pass_name: of the pass.
        why: part of its remark; ``""`` where it says nothing.
    """
    fused = Fused(function, pass_name)
    trained = [t.requires_grad for t in inputs]
    actual, expected = (run(f, inputs, trained=trained) for f in (fused, function))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert fused.rewrites == 0
    assert not [n for n in fused.graph.nodes if "memopt" in str(n.target)]
    texts = [remark.text for remark in fused.said(RemarkKind.MISSED)]
    assert (not texts) if not why else any(why in text for text in texts), texts
