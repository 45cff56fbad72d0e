"""A fused region as a call of one operator, in place of its nodes.

`LoweredRows` is the region as a function: of the same tensors, with the same results. On the CPU
it runs the nodes themselves, as text. Both texts are of the region by itself, where nodes are
named after their operators: what many layers have in common is one text, and compiled once.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from memopt._torch import size_hint
from memopt.device import DEVICES, DeviceSpec
from memopt.graph import packet_name
from memopt.kernels.region import REGION
from memopt.rows.ir import RowProgram
from memopt.rows.nodes import is_seen_through, results_of
from memopt.rows.reader import read_rows
from memopt.rows.select import FusedRows, choose_regions
from memopt.rows.source import triton_source
from memopt.rows.tiling import Tiling, tilings

# What an FX graph takes for granted when it prints itself; `memopt.kernels.region` has the first.
_GLOBALS = frozenset("torch device inf nan NoneType fx_pytree pytree".split())


@dataclass(frozen=True)
class LoweredRows:
    """A region with its code.

    Attributes:
        region: its nodes and what they compute.
        program: the same by itself.
        inputs: the tensors that it reads.
        sizes: symbolic sizes that its nodes name.
        results: the members that it gives.
        plain: PyTorch code, the nodes themselves.
        kernel: Triton code.
        tilings: its configurations.
        tiling: which of them runs.
    """

    region: FusedRows
    program: RowProgram
    inputs: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    plain: str
    kernel: str
    tilings: tuple[Tiling, ...]
    tiling: int = 0

    @property
    def ideal_bytes(self) -> sympy.Expr:
        """What it reads and writes once."""
        return self.program.ideal_bytes

    def __call__(self, *inputs: torch.Tensor, sizes: Sequence[int] = ()) -> list[torch.Tensor]:
        """Run it on tensors, as the graph would."""
        results: list[torch.Tensor] = REGION(*self.arguments(list(inputs), list(sizes)))
        return results

    def arguments(self, inputs: Sequence[Any], sizes: Sequence[Any]) -> tuple[Any, ...]:
        """What the operator is called with."""
        return inputs, sizes, self.plain, self.kernel, self.tiling

    def as_nodes(self) -> fx.GraphModule:
        """Its nodes as a graph of its own, with the sizes that tracing saw."""
        graph, _ = _by_itself(self.region, self.inputs, self.results, self.hints())
        return fx.GraphModule({}, graph)

    def as_call(self) -> fx.GraphModule:
        """The same as a call of the operator."""
        graph = fx.Graph()
        inputs = [graph.placeholder(f"x_{place}") for place in range(len(self.inputs))]
        sizes = list(self.hints().values())
        call = graph.call_function(REGION, self.arguments(inputs, sizes))
        places = range(len(self.results))
        graph.output([graph.call_function(operator.getitem, (call, place)) for place in places])
        return fx.GraphModule({}, graph)

    def hints(self) -> dict[fx.Node, int]:
        """The symbolic sizes as numbers."""
        return {node: size_hint(node.meta["val"]) for node in self.sizes}


def lower_rows(region: FusedRows, device: DeviceSpec) -> LoweredRows:
    """Write a region's code.

    Args:
        region: which.
        device: what its blocks are made for.
    """
    needed = _needed(region)
    tensors = {t.name: None for t in region.program.arguments}
    named = {n.name: n for n in needed if n.name in tensors}
    made = {n for n in needed if n in region.members or is_seen_through(n)}
    sizes = tuple(n for n in needed if n not in made and n.name not in named)
    inputs = tuple(named[name] for name in tensors)
    results = tuple(results_of(region.members))
    graph, twins = _by_itself(region, inputs, results, dict.fromkeys(sizes))
    for node, twin in twins.items():
        twin.meta["val"] = node.meta["val"]
    members = [twins[node] for node in region.members]
    program = read_rows(members, region.program.space)
    read = [t.name for t in program.arguments]
    assert read == [twins[n].name for n in inputs], "bug in memopt: tensors are read in two orders"
    configurations = tilings(program, device)
    kernel = triton_source(program, configurations, _operators(members))
    plain = _plain(graph)
    return LoweredRows(region, program, inputs, sizes, results, plain, kernel, configurations)


def lower_regions(gm: fx.GraphModule, device: DeviceSpec = DEVICES["a100"]) -> int:
    """Replace every region of a graph of aten operators by a call; how many there are.

    Args:
        gm: with traced values.
        device: what blocks are made for.
    """
    lowered = [lower_rows(region, device) for region in choose_regions(gm.graph)]
    replace_regions(gm.graph, lowered)
    if lowered:
        gm.graph.lint()
        gm.recompile()
    return len(lowered)


def replace_regions(graph: fx.Graph, lowered: Sequence[LoweredRows]) -> None:
    """Replace regions of a graph by a call each."""
    replaced: dict[fx.Node, fx.Node] = {}
    for region in lowered:
        _replace(graph, region, replaced)
    members = {node for region in lowered for node in region.region.members}
    for node in reversed(graph.nodes):
        if not node.users and (node in members or (lowered and is_seen_through(node))):
            graph.erase_node(node)


def _needed(region: FusedRows) -> list[fx.Node]:
    """The members, what they read, and what is seen through in between, in order."""
    inside = set(region.members)
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node not in found:
            if node in inside or is_seen_through(node):
                for source in node.all_input_nodes:
                    visit(source)
            found[node] = None

    for member in region.members:
        visit(member)
    return list(found)


def _by_itself(
    region: FusedRows,
    inputs: Iterable[fx.Node],
    results: Iterable[fx.Node],
    sizes: Mapping[fx.Node, int | None],
) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """The nodes as a graph of its own that gives a list, and what each of them is there.

    Args:
        region: which.
        inputs: the tensors that it reads; the graph's first inputs.
        results: the members that it gives.
        sizes: symbolic sizes, as numbers or as further inputs.
    """
    graph = fx.Graph()
    twins: dict[fx.Node, Any] = {n: graph.placeholder(f"x_{i}") for i, n in enumerate(inputs)}
    for place, (node, number) in enumerate(sizes.items()):
        twins[node] = graph.placeholder(f"size_{place}") if number is None else number
    for node in _needed(region):
        if node not in twins:
            args, named = fx.map_arg((node.args, node.kwargs), twins.__getitem__)
            name = packet_name(node.target).rpartition(".")[2]
            twins[node] = graph.create_node(node.op, node.target, args, named, name)
    graph.output([twins[node] for node in results])
    return graph, twins


def _plain(graph: fx.Graph) -> str:
    """A graph as a function ``forward(self, *inputs)``."""
    code = graph.python_code("self")
    assert code.globals.keys() <= _GLOBALS, f"bug in memopt: {code.globals.keys() - _GLOBALS}"
    return code.src


def _operators(members: Iterable[fx.Node]) -> list[str]:
    """Nodes as lines to read."""
    return [f"{n.name} = {packet_name(n.target)}({', '.join(map(str, n.args))})" for n in members]


def _replace(graph: fx.Graph, lowered: LoweredRows, replaced: dict[fx.Node, fx.Node]) -> None:
    """Put the call behind the last member, and what reads it but stood before behind the call."""
    inside = set(lowered.region.members)
    first, last = lowered.region.members[0], lowered.region.members[-1]
    inputs = [replaced.get(node, node) for node in lowered.inputs]
    with graph.inserting_after(last):
        call = graph.call_function(REGION, lowered.arguments(inputs, list(lowered.sizes)))
    call.meta["val"] = [node.meta["val"] for node in lowered.results]
    end = call
    for place, result in enumerate(lowered.results):
        with graph.inserting_after(end):
            end = graph.call_function(operator.getitem, (call, place))
        end.meta.update(result.meta)
        result.replace_all_uses_with(end)
        replaced[result] = end
    late: set[Any] = {*replaced.values()} & set(call.users)
    node = first
    while node is not call:
        following = node.next
        if node not in inside and late & set(node.all_input_nodes):
            late.add(node)
            end.append(node)
            end = node
        node = following
