"""Compute convolutions of an inference graph by some rows of their maps at a time.

A convolution, and what is between it and the next, needs for some rows of its result some rows of
what it reads. Between two values that something needs whole, as the statistics of a norm do, all
is computed by pieces of rows, and what is between exists by pieces only. A piece begins where the
last one ended, at every operator: the few rows that overlap are kept, so nothing is computed
twice. Results are written where they belong, over the rows of an input that dies, where one does.

Runs under a budget that nothing else fits, and for the lowest peak, on graphs without a backward.
Pays: bytes of maps, at a peak among them. Does not: in time, by smaller convolutions.
Exact: each number is computed as before, but for the order of sums in products of matrices and in
attention, which their libraries may choose by the number of rows.

Sources: layers computed tile by tile are of fused-layer CNN accelerators: Alwani et al. (2016),
doi:10.1109/MICRO.2016.7783725; by patches in software, of MCUNetV2: Lin et al. (2021),
arXiv:2110.15352. That results take the rows of what they are computed from is memopt's.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memopt._torch import disable_modes
from memopt.cutters import Regions, Trial
from memopt.graph import aten, is_view
from memopt.kernels.map_rows import KEEP
from memopt.passes.joint_nodes import call
from memopt.passes.map_levels import assign_levels, waist
from memopt.passes.map_moves import take
from memopt.passes.map_reads import Read, Rows, narrowed, rows_in, source_of
from memopt.passes.map_regions import Region, regions_of, reorder, rules_of
from memopt.passes.map_room import Room, channels_last

_WIDE = 0.25  # of the widest value that is cut: no region with one stays whole
_LEAST = 2  # pieces of a region that is cut
_MOST_NODES = 8192  # of all regions: what takes minutes to compile
_NEAR = 0.9  # of the peak: what comes this near is lowered with it


@dataclass(frozen=True)
class CutMaps:
    """``y = conv(f(x))`` -> ``y[r] = conv(f(x[r']))`` for pieces ``r`` of the rows.

    Attributes:
        most: pieces of a map, a power of two.
    """

    name: ClassVar[str] = "cut_maps"
    covers: ClassVar[str] = "what goes with"
    most: int = 32

    def more(self, trial: Trial) -> Mapping[str, int]:
        """Twice as many pieces of each region in which too much is alive."""
        peak, limit = trial.liveness.peak_bytes, trial.limit_bytes
        alive = {name: trial.liveness.peak_among(own) for name, own in trial.regions.items()}
        binding = [name for name, nbytes in alive.items() if nbytes == peak]
        if all(trial.pieces.get(name, 0) >= self.most for name in binding):  # or none
            return {}
        bound = _NEAR * peak if limit is None else limit
        high = {name for name, nbytes in alive.items() if nbytes > bound}
        more = {name: min(self.most, 2 * trial.pieces.get(name, _LEAST)) for name in high}
        pieces = {**trial.pieces, **more}
        least = _LEAST if trial.pieces else 1
        nodes = sum(
            len(own) * pieces.get(name, least) // trial.pieces.get(name, least)
            for name, own in trial.regions.items()
        )
        return pieces if nodes <= _MOST_NODES else {}

    @disable_modes()  # numbers of rows are read while tensors may be fake
    def __call__(self, graph: fx.Graph, pieces: Mapping[str, int]) -> Regions:
        """Cut some regions.

        Args:
            graph: without a backward; changed in place.
            pieces: how many of each, by the name of one of its nodes; powers of two.

        Returns:
            Every region, cut or not, by its first node.
        """
        rules = rules_of(graph, self.most)
        whole: set[fx.Node] = set()
        while True:
            level = assign_levels(graph, rules, whole)
            regions = regions_of(rules, level)
            waists = [waist(region.rules) for region in regions]
            if not any(waists):
                break
            whole.update(node for node in waists if node is not None)
        found = {region.name: [node.name for node in region.rules] for region in regions}
        widest = max((r.nbytes for r in regions if r.pieces(pieces)), default=0)
        if not widest:
            return found
        regions = [region for region in regions if region.nbytes >= _WIDE * widest]
        reorder(graph, regions, level)
        cut = {node for region in regions for node in region.rules}
        room = Room(level, whole, cut)
        for region in regions:
            before = set(graph.nodes)
            _Cut(graph, region, region.pieces(pieces) or _LEAST, room).run()
            found[region.name] = [node.name for node in graph.nodes if node not in before]
        for node, map_ in room.moved.items():
            node.replace_all_uses_with(map_, lambda user: user not in cut)
        for node in reversed([node for region in regions for node in region.rules]):
            graph.erase_node(node)
        graph.lint()
        return found


@dataclass(frozen=True)
class _Span:
    """Rows of a value in a piece.

    Attributes:
        needed: the first that is read.
        start: the first that is computed; those before it were kept of the last piece.
        end: the one after the last.
    """

    needed: int
    start: int
    end: int


class _Cut:
    """One region, computed piece by piece.

    Args:
        graph: the graph.
        region: what is cut.
        pieces: how many.
        room: where results go.
    """

    def __init__(self, graph: fx.Graph, region: Region, pieces: int, room: Room) -> None:
        self.graph, self.region, self.room = graph, region, room
        self.dims = {**region.inputs, **{n: rule.dim for n, rule in region.rules.items()}}
        self.readers: dict[fx.Node, list[tuple[fx.Node, Read]]] = {n: [] for n in self.dims}
        for node, rule in region.rules.items():
            for read in rule.reads:
                self.readers[read.source].append((node, read))
        self.ends = self._ends(pieces)
        self.weights: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Cut it."""
        with self.graph.inserting_before(next(iter(self.region.rules))):
            for node in self.region.outputs:
                self.room.find(node, self.dims, self.region.rules, self.ends)
            self._turn_weights()
            spans = self._spans()
            kept: dict[fx.Node, Rows] = {}
            written = dict.fromkeys(self.dims, 0)
            for number, ends in enumerate(self.ends):
                made = self._piece(spans[number], kept, written)
                written = ends
                later = spans[number + 1] if number + 1 < len(spans) else {}
                kept = {n: self._part(n, made[n], span) for n, span in later.items() if n in made}
            for node in self.region.returned:
                self.room.moved[node] = self.room.view(node)

    def _turn_weights(self) -> None:
        """Weights in the layout that convolutions prefer: once, not once for every piece."""
        for node in self.region.rules:
            if node.target is aten.convolution.default and not node.args[6]:
                weight: Any = node.args[1]
                layout = channels_last(weight.meta["val"])
                if layout is not torch.preserve_format and weight not in self.weights:
                    whole, turn = self.room.current(weight), aten.clone.default
                    self.weights[weight] = call(
                        self.graph, turn, whole, memory_format=layout, like=node
                    )

    def _ends(self, pieces: int) -> list[dict[fx.Node, int]]:
        """For each piece the row before which it ends, of every value."""
        found: list[dict[fx.Node, int]] = []
        for number in range(1, pieces + 1):
            ends: dict[fx.Node, int] = {}
            for node in reversed(self.dims):
                rows = rows_in(node, self.dims[node])
                needed = [r.window(0, ends[u])[1] for u, r in self.readers[node] if ends[u]]
                if node in self.region.outputs:
                    needed.append(-(-rows * number // pieces))
                ends[node] = min(rows, max(needed, default=0))
            found.append(ends)
        return found

    def _spans(self) -> list[dict[fx.Node, _Span]]:
        """For each piece what it has of every value of which it needs any rows."""
        found: list[dict[fx.Node, _Span]] = []
        before = dict.fromkeys(self.dims, 0)
        for ends in self.ends:
            spans: dict[fx.Node, _Span] = {}
            for node in reversed(self.dims):
                firsts = [
                    max(0, read.window(spans[user].start, spans[user].end)[0])
                    for user, read in self.readers[node]
                    if user in spans and spans[user].start < spans[user].end
                ]
                if node in self.region.outputs:
                    firsts.append(before[node])
                needed = min(firsts, default=ends[node])
                start = before[node] if self._is_kept(node) else needed
                if min(needed, start) < ends[node]:
                    spans[node] = _Span(min(needed, ends[node]), start, ends[node])
            found.append(spans)
            before = ends
        for node in filter(self._is_kept, self.dims):
            needed = self.ends[-1][node]
            for ends, spans in zip(reversed(self.ends), reversed(found), strict=True):
                end = ends[node]  # what a later piece needs is kept in this one too
                span = spans.get(node, _Span(end, end, end))
                needed = min(needed, span.needed)
                if min(needed, span.start) < end:
                    spans[node] = _Span(needed, span.start, end)
        return [{node: spans[node] for node in self.dims if node in spans} for spans in found]

    def _is_kept(self, node: fx.Node) -> bool:
        """Whether rows that the next piece needs again are kept: no row is computed twice."""
        if node in self.region.rules:
            made = source_of(node) if node.target is operator.getitem else node
            return isinstance(node.meta["val"], torch.Tensor) and not is_view(made)
        return any(self.room.overlap(node, result) for result in self.region.outputs)

    def _piece(
        self,
        spans: Mapping[fx.Node, _Span],
        kept: Mapping[fx.Node, Rows],
        written: Mapping[fx.Node, int],
    ) -> dict[fx.Node, Rows]:
        """Compute some rows of every value, and put those of results in their places.

        Args:
            spans: which.
            kept: those of the last piece that are needed again.
            written: the row before which the last piece ended, of every value.
        """
        made: dict[fx.Node, Rows] = {}
        for node, span in spans.items():
            before = kept[node] if span.needed < span.start else None
            if span.start == span.end:
                assert before is not None
                made[node] = before
                continue
            rows = self._computed(node, span, made)
            if node in self.region.outputs:
                first, dim = written[node], self.dims[node]
                self.room.put(node, narrowed(self.graph, rows, dim, first, span.end))
            made[node] = rows if before is None else self._joined(node, before, rows)
        return made

    def _computed(self, node: fx.Node, span: _Span, made: Mapping[fx.Node, Rows]) -> Rows:
        if node not in self.region.rules:
            where = self.dims[node], span.start, span.end
            return Rows(take(self.room.current(node), *where, like=node), span.start, span.end)
        rule = self.region.rules[node]
        by_rows = {read.source for read in rule.reads}
        wholes = [n for n in node.all_input_nodes if n not in by_rows]
        given = {n: Rows(self.weights.get(n) or self.room.current(n), 0, 0) for n in wholes}
        for read in rule.reads:
            first, last = read.window(span.start, span.end)
            first, last = max(0, first), min(last, rows_in(read.source, read.dim))
            given[read.source] = narrowed(self.graph, made[read.source], read.dim, first, last)
        rows = rule.make(self.graph, Rows(node, span.start, span.end), given)
        return Rows(rows, span.start, span.end)

    def _joined(self, node: fx.Node, before: Rows, rows: Rows) -> Rows:
        both = [before.node, rows.node]
        whole = call(self.graph, aten.cat.default, both, self.dims[node], like=node)
        return Rows(whole, before.start, rows.end)

    def _part(self, node: fx.Node, rows: Rows, following: _Span) -> Rows:
        """The rows that the next piece needs again: a copy, so that the others can go."""
        first = max(following.needed, rows.start)
        if first >= min(rows.end, following.start) or first == rows.start:
            return rows
        part = narrowed(self.graph, rows, self.dims[node], first, rows.end)
        layout = channels_last(part.node.meta["val"])
        return Rows(call(self.graph, KEEP, part.node, layout, like=node), first, rows.end)
