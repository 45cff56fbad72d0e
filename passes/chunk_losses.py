"""Compute losses on a head's logits by chunks of rows, so that the logits never exist.

The pass finds ``linear -> (factor, softcap, bias, cast, views) -> loss`` in whatever model it
stands and puts one operator in its place, which computes loss and gradients chunk by chunk. In
distillation two heads meet at one loss, and neither's logits exist. Logits that the graph returns
as well are returned as ``LazyLogits``, computed when they are used.

Pays: wherever the logits are large, which is every language model: forward and backward hold one
chunk of them, and eager's log-softmax, its gradient and the copies between are gone. Does not: in
a classifier with a few classes; there the pass leaves the graph alone.

Source: see ``memopt.kernels.linear_cross_entropy``; logits that exist on demand are memopt's own.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from memopt._torch import size_hint
from memopt.emit import emit, traced
from memopt.errors import ConfigError
from memopt.graph import source_line
from memopt.passes.class_shards import class_shards
from memopt.passes.contrastive_losses import fuse_pairs
from memopt.passes.divergence_operators import left_whole, write_divergence
from memopt.passes.divergences import Divergence, Divergences, find_divergences
from memopt.passes.heads import Head, overwriter, unsafe
from memopt.passes.kept_logits import keep
from memopt.passes.logits import Logits, flipped, follow, rows_of
from memopt.passes.row_losses import Loss, find_heads, find_loss, why_not
from memopt.passes.row_operators import RowOperators
from memopt.passes.stacked_rows import unstack
from memopt.passes.steps import is_one
from memopt.passes.unfollowed import find_unfollowed
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind
from memopt.returned import ReturnedLogits

MODES = ("lazy", "none", "keep", "full")
_MIN_CLASSES = 256


@dataclass
class _Readers:
    """Who reads a head's logits, all of whom can be served.

    Attributes:
        heads: the head and those that are its transposes.
        members: the nodes that hold logits.
        returned: logits that the graph returns.
        losses: the losses of each head.
        distilled: the divergences whose student the head is.
    """

    heads: list[Head]
    members: set[fx.Node] = field(default_factory=set)
    returned: list[Logits] = field(default_factory=list)
    losses: dict[Head, list[Loss]] = field(default_factory=dict)
    distilled: dict[Divergence, None] = field(default_factory=dict)

    @property
    def served(self) -> list[Loss | Divergence]:
        """All losses and divergences."""
        return [*self.distilled, *(loss for group in self.losses.values() for loss in group)]


def _readers(head: Head, divergences: Divergences) -> _Readers | str:
    """The readers of a head's logits, or the one that needs them whole."""
    found = _Readers([head])
    for own in found.heads:  # grows while it is read
        nodes, readers = follow(own)
        found.members.update(nodes)
        for reader, logits in readers:
            other = flipped(reader, logits, own)
            loss = find_loss(reader, logits)
            distilled = divergences.reading(reader, own)
            if reader.op == "output" and own is head:
                found.returned.append(logits)
            elif other is not None:
                found.heads.append(other)
            elif loss is not None:
                found.losses.setdefault(own, []).append(loss)
            elif distilled:
                found.distilled.update(dict.fromkeys(distilled))
            else:
                reason = divergences.reasons.get(reader) or why_not(reader, logits)
                return f"the logits are also read by {reader.name} ({reason})"
    return found


def _too_late(head: Head, last: fx.Node, *, sharded: bool = False) -> str:
    """Why the logits may not be made as late as at ``last``; or ``""``."""
    if reason := unsafe(head, last, sharded=sharded):
        return reason
    members = follow(head)[0].keys()
    read = {n for member in members - {head.node} for n in member.all_input_nodes}
    if writer := overwriter(read - members, head.node, last, besides=members):
        return f"{writer.name} overwrites a factor or bias of the logits before the loss"
    return ""


@dataclass(frozen=True)
class ChunkLosses:
    """``cross_entropy(linear(x, w), y)`` -> ``linear_cross_entropy(x, w, y)``.

    Attributes:
        logits: what becomes of logits that the graph returns: ``"lazy"`` computes them when they
            are used, ``"none"`` returns None, ``"keep"`` keeps what the loss computes, without
            gradient, ``"full"`` leaves such graphs alone.
        chunk_rows: rows whose logits exist at a time; 0 to choose, on a GPU by measurement.
    """

    logits: str = "lazy"
    chunk_rows: int = 0

    name: ClassVar[str] = "chunk_losses"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset({"losses_chunked"})

    def __post_init__(self) -> None:
        if self.logits not in MODES:
            allowed = ", ".join(map(repr, MODES))
            raise ConfigError(f"chunk_losses: logits={self.logits!r}: allowed are {allowed}")
        if not isinstance(self.chunk_rows, int) or self.chunk_rows < 0:
            raise ConfigError(
                f"chunk_losses: chunk_rows={self.chunk_rows!r}: allowed is a number of rows, or 0 "
                f"to choose it"
            )

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        if self.logits == "none" and _breaks(graph):
            return replace(self, logits="lazy")(graph, ctx)
        rows, seen = self.chunk_rows, set[fx.Node]()
        rewrites = fuse_pairs(
            graph, ctx, self.name, least=_MIN_CLASSES, chunk_rows=rows, logits=self.logits
        )
        while True:  # each rewrite may erase what another head was found to read
            divergences = find_divergences(graph)
            heads = (*divergences.heads, *find_heads(graph))
            head = next((head for head in heads if head.node not in seen), None)
            if head is None:
                break
            seen.add(head.node)
            reason = self._rewrite(graph, head, ctx, divergences)
            if reason:
                source = source_line(head.node)
                ctx.remark(self.name, RemarkKind.MISSED, reason, head.node.name, source)
            else:
                rewrites += 1
        for found in find_unfollowed(graph, seen, _MIN_CLASSES):
            place = found.node.name, source_line(found.node)
            ctx.remark(self.name, RemarkKind.MISSED, found.reason, *place)
        return rewrites

    def _rewrite(
        self, graph: fx.Graph, head: Head, ctx: PassContext, divergences: Divergences
    ) -> str:
        """Replace every reader of one head's logits; the reason where that cannot be done."""
        if size_hint(head.classes) < _MIN_CLASSES:
            return f"{head.classes} classes: too few to pay"
        readers = _readers(head, divergences)
        if isinstance(readers, str):
            return readers
        served = readers.served
        if not served:
            return "no loss reads the logits"
        (output,) = graph.find_nodes(op="output")
        found = [loss for group in readers.losses.values() for loss in group]
        if not {loss.node for loss in found}.isdisjoint(i for loss in found for i in loss.inputs):
            return "one loss on the logits is an input of another"
        last = output if readers.returned else max(reader.node for reader in served)
        shards = class_shards(head) if not readers.distilled and len(readers.heads) == 1 else None
        if shards and (reason := shards.why_not(found)):
            return reason
        whole = {d: divergences.teacher_stays(d) for d in readers.distilled}
        teachers = {d: left_whole(d.teacher) if s else d.teacher for d, s in whole.items()}
        refusals = (_too_late(teacher.head, d.node) for d, teacher in teachers.items())
        late = _too_late(head, last, sharded=shards is not None)
        late = late or self._refusal(head, readers.returned, sharded=shards is not None)
        if reason := late or next(filter(None, refusals), ""):
            return reason
        if unstack(graph, readers.members):
            return self._rewrite(graph, head, ctx, find_divergences(graph))
        operators = {
            own: RowOperators(graph, own, self.chunk_rows, shards) for own in readers.heads
        }
        for own, group in readers.losses.items():
            alone = len(group) == 1 and not readers.distilled
            operators[own].replace_all(group, alone=alone)
        for divergence, teacher in teachers.items():
            alone = len(served) == 1
            write_divergence(graph, divergence, teacher, self.chunk_rows, alone=alone)
        returned = list(dict.fromkeys(readers.returned))
        call = operators[head].reduced if self.logits == "keep" else None
        if call is None or not keep(head, found[0], call, returned, output):
            for logits in returned:
                self._return(graph, head, logits, operators[head], output, ctx)
        dead = readers.members.union(*(d.unread(bool(stays)) for d, stays in whole.items()))
        for node in reversed([n for n in graph.nodes if n in dead]):
            if not node.users:  # in-place ones too, which count as impure elsewhere
                graph.erase_node(node)
        rows = operators[head].chunk_rows
        text = f"{len(served)} reader{'s' * (len(served) > 1)} of the logits "
        text += f"by chunks of {rows} rows" if rows else "by tiles"
        text += f"; {head.classes} classes each"
        if shards:
            text += f", {shards.count} of them on this rank"
        if readers.returned:
            text += f"; returned logits: {self.logits}"
        for stays in filter(None, whole.values()):
            text += f"; a teacher's logits stay whole: {stays}"
        source = source_line(head.node)
        ctx.remark(self.name, RemarkKind.APPLIED, text, head.node.name, source)
        return ""

    def _refusal(self, head: Head, returned: list[Logits], *, sharded: bool) -> str:
        """Why logits that are returned cannot be given up."""
        if not returned or self.logits in ("none", "keep"):
            return ""
        if self.logits == "full":
            return "the logits are returned, and the option logits='full' keeps them whole"
        if sharded:  # one rank alone may come to use them, and would wait for the others
            return "the head is distributed, and its logits are returned"
        if any(r.normalised or r.classes_at != -1 for r in returned):
            return "the graph returns the logits normalised or transposed"
        if any(len(r.biases) > 1 or any(map(is_one, r.biases)) for r in returned):
            return "the logits are returned with two biases, or one number added to all"
        sources = [head.weight, *(bias for r in returned for bias in r.biases)]
        if any(node.op != "placeholder" for node in sources) or head.transposed:
            return "the logits are returned, and their weight is computed in the graph"
        return ""

    def _return(
        self,
        graph: fx.Graph,
        head: Head,
        logits: Logits,
        own: RowOperators,
        output: fx.Node,
        ctx: PassContext,
    ) -> None:
        """Put something else into the places where the output has these logits."""
        if self.logits == "keep":
            with graph.inserting_before(output):
                kept = emit(graph, "detach", (logits.node,), like=logits.node)
            output.replace_input_with(logits.node, kept)
            return
        results = output.args[0]
        assert isinstance(results, (tuple, list))
        places = [i for i, node in enumerate(results) if node is logits.node]
        if self.logits == "none":
            changed = [None if i in places else node for i, node in enumerate(results)]
            output.args = (tuple(changed),)
            return
        with graph.inserting_before(output):
            hidden = rows_of(graph, head, logits, own.rows)
        output.replace_input_with(logits.node, hidden)
        inputs = graph.find_nodes(op="placeholder")
        ctx.wrappers.append(
            ReturnedLogits(
                places=tuple(places),
                weight=inputs.index(head.weight),
                bias=inputs.index(logits.biases[0]) if logits.biases else None,
                product_dtype=traced(head.node).dtype,
                dtype=logits.dtype,
                scale=logits.scale,
                softcap=logits.softcap,
                detached=logits.detached or not traced(logits.node).requires_grad,
            ).wrap
        )


def _breaks(graph: fx.Graph) -> bool:
    """Whether Python goes on behind this graph with what it returns, and may read logits there."""
    reason = getattr(graph.owning_module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))
