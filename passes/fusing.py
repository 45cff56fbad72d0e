"""Puts operators in the place of what rule tables find: the part that all such passes share.

Each rule is one spelling of an operator. From every anchor, a node that the operator cannot be
written without, the results that it may be part of are tried, the last one first, and of those the
rules in order. What fits becomes one operator, at the place of the last node, if

(1) nothing else reads a value in between;
(2) gradients pass everywhere, or nowhere behind;
(3) no input is overwritten between its first reading and the last node;
(4) no functorch transform and no tensor subclass is about;
(5) what reads the result can read the operator's, which may lie in memory in another order;
(6) it is no slower than what Inductor makes of the nodes, both with their gradients: timed on the
    device at hand, and remembered. Where the options name a pass nothing is timed.

What is found and is not replaced has a remark with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memopt._torch import is_traceable_wrapper_subclass
from memopt.emit import same_shape, traced
from memopt.graph import source_line
from memopt.kernels.measured import fastest
from memopt.kernels.serving import serves
from memopt.passes.heads import overwriter, stops_gradient
from memopt.passes.patterns import (
    ADDITIONS,
    PRODUCTS,
    QUOTIENTS,
    SUBTRACTIONS,
    Match,
    is_tensor,
)
from memopt.passes.rules import Found, Rule, Written
from memopt.passes.steps import cast_of, name_of
from memopt.passes.strides import reorder
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind
from memopt.trials import Trial

_STEPS = PRODUCTS | QUOTIENTS | ADDITIONS | SUBTRACTIONS
_MOST_STEPS = 10
_SLOWER = "Inductor's loops run faster here"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Family:
    """One operator's rules.

    Attributes:
        pass_name: for remarks.
        rules: in the order in which they are tried.
        anchor: what the operator cannot be written without.
        steps: the targets that lead from an anchor to the result, besides arithmetic and casts.
    """

    pass_name: str
    rules: tuple[Rule, ...]
    anchor: Callable[[fx.Node], bool]
    steps: frozenset[Any] = frozenset()

    def fuse(self, graph: fx.Graph, ctx: PassContext, *, cpu: bool) -> int:
        """Replace what can be replaced, and remark what cannot.

        Args:
            graph: a Dynamo graph.
            ctx: where it speaks.
            cpu: whether to do so on the CPU as well.

        Returns:
            The number of operators that were put in.
        """
        rewrites, erased, apart = 0, set[fx.Node](), _transformed(graph)
        for anchor in [n for n in graph.nodes if self.anchor(n)]:
            if anchor in erased or not served(anchor, cpu):
                continue
            first = ""
            for found in self._matches(anchor):
                reason = _refusal(found, apart)
                if not reason:
                    reason = self._replace(graph, found, anchor, ctx, erased)
                if not reason:
                    rewrites, first = rewrites + 1, ""
                    break
                first = first or f"{found.rule.name}: {reason}"
                if reason == _SLOWER:  # nor is a part of it to be tried
                    break
            if first:
                self._remark(ctx, RemarkKind.MISSED, first, anchor)
        return rewrites

    def _matches(self, anchor: fx.Node) -> Iterator[Found]:
        """Every match with the anchor in it."""
        for last in _results(anchor, self.steps):
            for rule in self.rules:
                matches = rule.pattern.find(last, Match())
                found = next((m for m in matches if anchor in m.inner), None)
                if found is not None:
                    yield Found(rule, found, last)

    def _replace(
        self,
        graph: fx.Graph,
        found: Found,
        anchor: fx.Node,
        ctx: PassContext,
        erased: set[fx.Node],
    ) -> str:
        """Put the operator in; the reason where its result does not fit."""
        assert found.rule.write is not None
        before = set(graph.nodes)
        with graph.inserting_before(found.last):
            written = found.rule.write(graph, found)
        added = [n for n in graph.nodes if n not in before]
        misplaced = (_misplaced(old, new) for old, new in written.results.items())
        reason = next(filter(None, misplaced), "")
        if not reason and self.pass_name not in ctx.config.passes:
            reason = _slower(found, written, added)
        if reason:
            for node in reversed(added):
                graph.erase_node(node)
            return reason
        said = f"{found.rule.name}: {written.said}"
        self._remark(ctx, RemarkKind.APPLIED, said, anchor)
        for old, new in written.results.items():
            old.replace_all_uses_with(new)
        dead = found.match.inner | found.match.casts | written.results.keys()
        for node in sorted(dead, reverse=True):
            if not node.users:  # nobody may be taken for a reader any more
                graph.erase_node(node)
                erased.add(node)
        return ""

    def _remark(self, ctx: PassContext, kind: RemarkKind, text: str, node: fx.Node) -> None:
        ctx.remark(self.pass_name, kind, text, node.name, source_line(node))


@dataclass(frozen=True)
class FusePass:
    """One family's rules as a pass.

    Attributes:
        cpu: whether to put operators in on the CPU as well.
    """

    family: ClassVar[Family]
    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    cpu: bool = False

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        return self.family.fuse(graph, ctx, cpu=self.cpu)


def _results(anchor: fx.Node, steps: frozenset[Any]) -> list[fx.Node]:
    """The nodes that arithmetic leads to from an anchor, the last first."""
    found, edge = {anchor}, [anchor]
    for _ in range(_MOST_STEPS):
        edge = [
            user
            for node in edge
            for user in node.users
            if user not in found
            and (user.target in _STEPS or user.target in steps or cast_of(user) is not None)
        ]
        found.update(edge)
    return sorted((n for n in found if is_tensor(n)), reverse=True)


def served(node: fx.Node, cpu: bool) -> bool:
    """Whether the operator is to be used for such a tensor."""
    value = traced(node)
    if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS:
        return False
    return serves(value) or (cpu and value.device.type == "cpu")


def _refusal(found: Found, apart: set[fx.Node]) -> str:
    """Why a match is left alone, or ``""``."""
    rule = found.rule
    if rule.write is None:
        return rule.why
    return (rule.guard(found) if rule.guard else "") or _unfit(found, apart)


def _unfit(found: Found, apart: set[fx.Node]) -> str:
    """Which of the first four clauses keeps an operator out, or ``""``."""
    match, last = found.match, found.last
    inputs = [n for n in match.bound.values() if isinstance(n, fx.Node)]
    first = min(match.inner | match.casts)
    if not apart.isdisjoint({first, last}):
        return "it is inside a functorch transform"  # (4)
    if any(is_traceable_wrapper_subclass(traced(n)) for n in inputs):
        return "it is distributed, or of another tensor subclass"
    for node in sorted(match.inner - {last}):
        if reader := next((user for user in node.users if user not in match.inner), None):
            return f"{node.name} is also read by {reader.name}"  # (1)
    stopped = next((n for n in sorted(match.inner) if is_tensor(n) and stops_gradient(n)), None)
    if stopped is not None and traced(last).requires_grad:
        return f"no gradient passes {stopped.name}"  # (2)
    if writer := overwriter(inputs, first, last):
        return f"{writer.name} overwrites an input in between"  # (3)
    return ""


def _transformed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes inside functorch transforms."""
    depth, inside = 0, set[fx.Node]()
    for node in graph.nodes:
        name = name_of(node)
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth:
            inside.add(node)
    return inside


def _misplaced(old: fx.Node, new: fx.Node) -> str:
    """Why clause (5) does not hold, or ``""``."""
    before, after = traced(old), traced(new)
    return "" if same_shape(before.stride(), after.stride()) else reorder(old, after)


def _slower(found: Found, written: Written, added: Sequence[fx.Node]) -> str:
    """Why clause (6) does not hold, or ``""``."""
    olds, news = list(written.results), list(written.results.values())
    shared = found.match.inner | found.match.casts
    operator = Trial.of(news, shared.union(added))
    loops = Trial.of(olds, shared.union(olds))
    seconds = {"operator": operator.seconds, "loops": loops.seconds}
    question = found.rule.name, operator.question, loops.question
    if fastest(question, seconds, traced(found.last).device) == "operator":
        return ""
    return _SLOWER
