"""A fused region as a call of one operator, in place of its nodes.

`LoweredRows` is the region as a function: of the same tensors, with the same results. On the CPU
it runs the nodes themselves, as text.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from memopt.device import DEVICES, DeviceSpec
from memopt.graph import packet_name
from memopt.kernels.region import REGION
from memopt.row_ir import RowProgram
from memopt.row_nodes import is_seen_through, results_of
from memopt.row_select import FusedRows, choose_regions
from memopt.row_source import triton_source
from memopt.row_tiling import tilings

# What an FX graph takes for granted when it prints itself; `memopt.kernels.region` has the first.
_GLOBALS = frozenset("torch device inf nan NoneType fx_pytree pytree".split())


@dataclass(frozen=True)
class LoweredRows:
    """A region with its code.

    Attributes:
        region: its nodes and what they compute.
        inputs: the tensors that it reads.
        sizes: symbolic sizes that its nodes name.
        results: the members that it gives.
        plain: PyTorch code, the nodes themselves.
        kernel: Triton code.
    """

    region: FusedRows
    inputs: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    plain: str
    kernel: str

    @property
    def program(self) -> RowProgram:
        """What it computes."""
        return self.region.program

    @property
    def ideal_bytes(self) -> sympy.Expr:
        """What it reads and writes once."""
        return self.program.ideal_bytes

    def __call__(self, *inputs: torch.Tensor, sizes: Sequence[int] = ()) -> list[torch.Tensor]:
        """Run it on tensors, as the graph would."""
        results: list[torch.Tensor] = REGION(list(inputs), list(sizes), self.plain, self.kernel)
        return results


def lower_rows(region: FusedRows, device: DeviceSpec) -> LoweredRows:
    """Write a region's code.

    Args:
        region: which.
        device: what its blocks are made for.
    """
    program = region.program
    needed = _needed(region)
    tensors = {t.name: None for t in program.arguments}
    inputs = {n.name: n for n in needed if n.name in tensors}
    made = {n for n in needed if n in region.members or is_seen_through(n)}
    sizes = tuple(n for n in needed if n not in made and n.name not in inputs)
    ordered = tuple(inputs[name] for name in tensors)
    results = tuple(results_of(region.members))
    plain = _plain(needed, ordered + sizes, results)
    operators = [
        f"{n.name} = {packet_name(n.target)}({', '.join(map(str, n.args))})"
        for n in region.members
    ]
    kernel = triton_source(program, tilings(program, device), operators)
    return LoweredRows(region, ordered, sizes, results, plain, kernel)


def lower_regions(gm: fx.GraphModule, device: DeviceSpec = DEVICES["a100"]) -> int:
    """Replace every region of a graph of aten operators by a call; how many there are.

    Args:
        gm: with traced values.
        device: what blocks are made for.
    """
    count = len(replace_regions(gm.graph, device))
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def replace_regions(graph: fx.Graph, device: DeviceSpec) -> list[LoweredRows]:
    """Replace every region of a graph by a call; the regions, as they were."""
    lowered = [lower_rows(region, device) for region in choose_regions(graph)]
    replaced: dict[fx.Node, fx.Node] = {}
    for region in lowered:
        _replace(graph, region, replaced)
    members = {node for region in lowered for node in region.region.members}
    for node in reversed(graph.nodes):
        if not node.users and (node in members or (lowered and is_seen_through(node))):
            graph.erase_node(node)
    return lowered


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


def _plain(
    needed: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node]
) -> str:
    """The nodes as a function ``forward(self, *inputs)`` that gives a list."""
    graph = fx.Graph()
    twin = {node: graph.placeholder(node.name) for node in inputs}
    for node in needed:
        if node not in twin:
            twin[node] = graph.node_copy(node, twin.__getitem__)
    graph.output([twin[node] for node in results])
    code = graph.python_code("self")
    assert code.globals.keys() <= _GLOBALS, f"bug in memopt: {code.globals.keys() - _GLOBALS}"
    return code.src


def _replace(graph: fx.Graph, lowered: LoweredRows, replaced: dict[fx.Node, fx.Node]) -> None:
    """Put the call behind the last member, and what reads it but stood before behind the call."""
    inside = set(lowered.region.members)
    first, last = lowered.region.members[0], lowered.region.members[-1]
    inputs = [replaced.get(node, node) for node in lowered.inputs]
    with graph.inserting_after(last):
        args = (inputs, list(lowered.sizes), lowered.plain, lowered.kernel)
        call = graph.call_function(REGION, args)
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
