"""How fast a few nodes of a graph run: as a graph of their own, compiled by Inductor and timed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from memopt._torch import compile_apart, compile_fx, pytree, size_hint
from memopt.emit import traced
from memopt.graph import packet_name
from memopt.kernels.measured import best_seconds


@dataclass(frozen=True)
class Trial:
    """Some nodes of a Dynamo graph as a graph of their own.

    Attributes:
        graph: its placeholders are what the nodes read, its outputs what they are for.
        inputs: the traced values of the placeholders.
    """

    graph: fx.Graph
    inputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, results: Sequence[fx.Node], within: Collection[fx.Node]) -> "Trial":
        """What the results need of some nodes.

        Symbolic sizes become the numbers that tracing saw.

        Args:
            results: nodes whose values are tensors.
            within: the nodes to take; what is not among them is an input.
        """
        needed, edge = set[fx.Node](), [*results]
        while edge:
            node = edge.pop()
            if node in within and node not in needed:
                needed.add(node)
                edge += node.all_input_nodes
        graph, inputs = fx.Graph(), list[Tensor]()
        copies: dict[fx.Node, Any] = {}

        def copied(node: fx.Node) -> Any:
            if node not in copies:
                value = traced(node)
                if isinstance(value, Tensor):
                    inputs.append(value)
                    copies[node] = graph.placeholder(f"x{len(inputs)}")
                else:
                    copies[node] = pytree.tree_map(size_hint, value)
            return copies[node]

        for node in sorted({n for user in needed for n in user.all_input_nodes} - needed):
            copied(node)
        for node in sorted(needed):
            copies[node] = graph.node_copy(node, copied)
        graph.output(tuple(map(copied, results)))
        return cls(graph, tuple(inputs))

    @property
    def question(self) -> tuple[Any, ...]:
        """All that its time depends on, but the device; rows up to the next power of two."""
        places = {node: i for i, node in enumerate(self.graph.nodes)}

        def named(node: fx.Node) -> str:
            return f"%{places[node]}"

        calls = [
            (packet_name(n.target), fx.map_arg((n.args, n.kwargs), named))
            for n in self.graph.nodes
            if n.op != "placeholder"
        ]
        return (repr(calls), *map(_kind, self.inputs))

    def seconds(self) -> float:
        """Of one run, with the gradients that the inputs take; on random numbers.

        Raises:
            torch.OutOfMemoryError: it does not fit beside what is on the device.
        """
        device = self.inputs[0].device
        devices = [device] if device.type == "cuda" else []
        with compile_apart(), torch.random.fork_rng(devices), torch.enable_grad():
            inputs = [_random(value) for value in self.inputs]
            trained = [x for x in inputs if x.requires_grad]
            run: Any = compile_fx(fx.GraphModule({}, self.graph), inputs)
            upstream = [torch.randn_like(y) for y in run(*inputs) if y.requires_grad]

            def step() -> None:
                reached = [y for y in run(*inputs) if y.requires_grad]
                if upstream:
                    torch.autograd.grad(reached, trained, upstream, allow_unused=True)

            return best_seconds(step, device)


def _random(like: Tensor) -> Tensor:
    """A leaf of the same shape, strides and dtype, of random numbers, or of zeros if whole."""
    shape, strides = ([size_hint(n) for n in sizes] for sizes in (like.shape, like.stride()))
    steps = zip(shape, strides, strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps)
    real = like.dtype.is_floating_point or like.dtype.is_complex
    fill = torch.randn if real else torch.zeros
    x = fill(extent, dtype=like.dtype, device=like.device).as_strided(shape, strides)
    return x.requires_grad_(like.requires_grad)


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What the time of a graph depends on of an input."""
    width = size_hint(x.shape[-1]) if x.dim() else 1
    rows = size_hint(x.numel()) // max(1, width)
    return (rows - 1).bit_length(), width, x.is_contiguous(), str(x.dtype), x.requires_grad
