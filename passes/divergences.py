"""Finds divergences between two heads' distributions, in the spellings of plain PyTorch.

``F.kl_div`` in both directions, generalised Jensen-Shannon and hand-written sums are polynomials
in two distributions, the student's and the teacher's; see ``memopt.passes.terms``. The values of
single classes must go nowhere but into sums over all classes, by way of what acts on whole rows:
masks, weights, views. Then a divergence by rows can take their place.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import fx

from memopt.emit import shape_of, traced
from memopt.passes.distributions import divergence_of, is_at_hand, understand
from memopt.passes.heads import Head, memory, source_of
from memopt.passes.logits import follow
from memopt.passes.row_losses import arguments, find_loss
from memopt.passes.row_sums import plain_sum, tail_of
from memopt.passes.steps import written
from memopt.passes.terms import Mixture, Softmax, Terms, scaled, softmaxes


@dataclass(frozen=True)
class Divergence:
    """One divergence of a student from a teacher.

    Attributes:
        node: the elementwise values, or the ``kl_div`` that reduces them itself.
        student: the distribution that is a head's, and may be trained.
        teacher: the other one, a constant.
        beta, cross: which divergence; see ``memopt.kernels.teachers``.
        factor: on its values.
        result: the node that reduces over all rows and classes, or None.
        reduction: how it does; see ``plain_sum``.
        tail: the nodes that hold elementwise values after ``node``, and the sums over classes.
        inside: all nodes from the softmaxes to ``node``.
    """

    node: fx.Node
    student: Softmax
    teacher: Softmax
    beta: float
    cross: bool
    factor: float
    result: fx.Node | None = field(default=None, compare=False)
    reduction: str = field(default="none", compare=False)
    tail: tuple[fx.Node, ...] = field(default=(), compare=False)
    inside: frozenset[fx.Node] = field(default=frozenset(), compare=False)

    def unread(self, teacher_stays: bool) -> frozenset[fx.Node]:
        """What may have lost its last reader once the divergence is replaced."""
        if teacher_stays or is_at_hand(self.teacher.head):
            return self.nodes
        return self.nodes | follow(self.teacher.head)[0].keys()

    @property
    def nodes(self) -> frozenset[fx.Node]:
        """Every node that is replaced, and what only it needs."""
        results = () if self.result is None else (self.result,)
        return self.inside | {self.node, *self.tail, *results}


@dataclass(frozen=True)
class Divergences:
    """Those of a graph.

    Attributes:
        found: in the order of the graph.
        reasons: why a node that looks like a part of one is none.
        heads: of all students, found or not.
    """

    found: tuple[Divergence, ...]
    reasons: Mapping[fx.Node, str]
    heads: tuple[Head, ...]

    def reading(self, reader: fx.Node, head: Head) -> list[Divergence]:
        """The divergences of a student's head that a node is inside of."""
        own = [d for d in self.found if d.student.product is head.node]
        return [d for d in own if reader in d.inside or reader is d.node]

    def teacher_stays(self, divergence: Divergence) -> str:
        """Who reads the teacher's logits besides divergences; ``""`` for nobody."""
        head = divergence.teacher.head
        if is_at_hand(head):
            return ""
        taken = frozenset[fx.Node]().union(*(d.nodes for d in self.found))
        for reader, logits in follow(head)[1]:
            if reader not in taken and find_loss(reader, logits) is None:
                return f"{reader.name} reads them"
        known = follow(head)[0].keys() | follow(divergence.student.head)[0].keys()
        for node in sorted(divergence.inside - known - {divergence.result}):
            for user in node.users:
                if user not in taken:
                    return f"{user.name} reads {node.name}"
        return ""


def find_divergences(graph: fx.Graph) -> Divergences:
    """All divergences of a graph whose student is a head."""
    known, reasons = understand(graph), dict[fx.Node, str]()
    found, heads = list[Divergence](), list[Head]()
    for node, terms in _candidates(graph, known):
        own = [s.head for s in softmaxes(terms) if not is_at_hand(s.head)]
        if not own or len(shape_of(next(iter(softmaxes(terms))).logits.node)) < 2:
            continue
        inside = _inside(node, known)
        divergence = _identified(node, terms)
        if isinstance(divergence, Divergence):
            heads.append(divergence.student.head)
            divergence = _with_sums(replace(divergence, inside=inside), known)
        if isinstance(divergence, Divergence):
            found.append(divergence)
        else:
            heads += own
            reasons.update(dict.fromkeys((*inside, node), divergence))
    heads += _unfound(known)
    while bad := _escaping(found, known):
        divergence, reason = bad
        found.remove(divergence)
        reasons.update(dict.fromkeys((*divergence.inside, divergence.node), reason))
    return Divergences(tuple(found), reasons, tuple(dict.fromkeys(heads)))


def _unfound(known: Mapping[fx.Node, Terms]) -> list[Head]:
    """The heads of trained log-probabilities, whose readers may not be understood."""
    sources = list[Head | None]()
    for terms in known.values():
        for p, log_p in terms:
            if p is None and isinstance(log_p, Softmax) and log_p.trained:
                hand = is_at_hand(log_p.head)
                sources.append(source_of(log_p.product) if hand else log_p.head)
    return [head for head in sources if head is not None]


def _candidates(
    graph: fx.Graph, known: Mapping[fx.Node, Terms]
) -> Iterator[tuple[fx.Node, Terms]]:
    """Elementwise products that something else reads, and divergences that are reduced."""
    for node in graph.nodes:
        if node in known:
            product = any(p and log_p for p, log_p in known[node])
            if product and any(user not in known for user in node.users):
                yield node, known[node]
        elif node.target is F.kl_div:
            terms = divergence_of(node, known)
            if terms:
                yield node, terms


def _inside(node: fx.Node, known: Mapping[fx.Node, Terms]) -> frozenset[fx.Node]:
    """All nodes from the softmaxes to a node, which is among them unless it is reduced."""
    seen, pending = set[fx.Node](), [node]
    while pending:
        at = pending.pop()
        if at in seen or not (at in known or at.target is torch.stack or at is node):
            continue
        seen.add(at)
        pending += at.all_input_nodes
    return frozenset(seen)


def _identified(node: fx.Node, terms: Terms) -> Divergence | str:
    """Which divergence some terms are, and of whom; or why they are none that is known."""
    own = sorted(softmaxes(terms), key=_order)
    trained = [s for s in own if s.trained]
    if len(trained) > 1:
        return "both distributions need a gradient, and a teacher gets none"
    if any(s.logits.detached for s in trained):
        return "a part of what makes the student's logits has no gradient"
    if any(is_at_hand(s.head) for s in trained):
        return "the trained logits are not a head's as they are"
    for student in own:
        if is_at_hand(student.head) or (trained and not student.trained):
            continue
        for teacher in (s for s in own if s != student):
            for beta, cross, expected in _family(student, teacher, terms):
                factor = _ratio(terms, expected)
                if factor:
                    return Divergence(node, student, teacher, beta, cross, factor)
    return "no divergence that is known is made of these terms"


def _order(softmax: Softmax) -> tuple[object, ...]:
    """Trained ones first, then as in the graph: the same on every run."""
    logits = softmax.logits
    return not softmax.trained, softmax.product, logits.node, len(logits.path)


def _family(p: Softmax, q: Softmax, terms: Terms) -> Iterator[tuple[float, bool, Terms]]:
    """``beta``, ``cross`` and the terms of every divergence of ``p`` from ``q``."""
    yield 0.0, False, {(q, q): 1.0, (q, p): -1.0}
    yield 0.0, True, {(q, p): -1.0}
    yield 1.0, False, {(p, p): 1.0, (p, q): -1.0}
    for _, m in terms:
        if isinstance(m, Mixture) and {s for s, _ in m.shares} == {p, q}:
            beta = dict(m.shares)[q]
            of_q: Terms = {(q, q): beta, (q, m): -beta}
            yield beta, False, {**of_q, (p, p): 1 - beta, (p, m): beta - 1}


def _ratio(terms: Terms, expected: Terms) -> float | None:
    """The number that takes one to the other, if any does."""
    if terms.keys() != expected.keys():
        return None
    first = next(iter(expected))
    factor = terms[first] / expected[first]
    goal = scaled(expected, factor)
    return factor if all(math.isclose(terms[m], goal[m], rel_tol=1e-9) for m in goal) else None


def _with_sums(divergence: Divergence, known: Mapping[fx.Node, Terms]) -> Divergence | str:
    """With what becomes of the values; or why that is no sum of rows."""
    node = divergence.node
    if reason := _overwritten(divergence.inside):
        return reason
    if not shape_of(node):
        reduction = arguments(node, "input target size_average reduce reduction log_target").get(
            "reduction", "mean"
        )
        return replace(divergence, result=node, reduction=reduction)
    plain = plain_sum(node)
    if plain is not None:
        return replace(divergence, result=plain[0], reduction=plain[1], tail=plain[2])
    tail = tail_of(node, [user for user in node.users if user not in known])
    return tail if isinstance(tail, str) else replace(divergence, tail=tail)


def _overwritten(inside: frozenset[fx.Node]) -> str:
    """Which node writes into values on the way, as ``p[mask] = 0`` does; ``""`` for none."""
    held = {memory(node) for node in inside if isinstance(traced(node), torch.Tensor)}
    first = min(inside)
    for node in first.graph.nodes:
        if node > first and held & set(map(memory, written(node))):
            return f"{node.name} overwrites values on the way"
    return ""


def _escaping(
    found: list[Divergence], known: Mapping[fx.Node, Terms]
) -> tuple[Divergence, str] | None:
    """A divergence whose student's values are read by others too, and the reason."""
    taken = frozenset[fx.Node]().union(*(d.nodes for d in found))
    for divergence in found:
        product = divergence.student.product
        members = follow(divergence.student.head)[0]
        for node in sorted(divergence.inside):
            own = node not in known or any(s.product is product for s in softmaxes(known[node]))
            if not own or node in members or node is divergence.result:
                continue
            for user in node.users:
                if user not in taken:
                    return divergence, f"{user.name} reads {node.name}, a value for each class"
    return None
