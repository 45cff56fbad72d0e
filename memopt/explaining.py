"""``memopt.explain``: compile, run the forward once, and say what was done."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from memopt._torch import BackendCompilerFailed, pytree
from memopt.backend import compile_graph, read_options
from memopt.passes.compress import Compress
from memopt.pipeline import Compiled, configure
from memopt.record import GraphRecord
from memopt.report import Report


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """What memopt does to ``model`` on these inputs: which bytes go, at what price, and why.

    Compiles every graph of ``model(*inputs, **kwargs)`` as ``torch.compile`` would, both halves
    at once, reads the peak off the emitted code, and runs the forward once, with the caller's
    gradient mode. The model is left as it was: nothing compiled stays attached to it.

    Where values are held in a form that rounds them, it also runs two whole steps, and measures
    how far the gradient is from that of the same step without such forms, in as little memory as
    that can be run in.

    Args:
        model: a function or module.
        *inputs: its positional inputs.
        options: as for ``torch.compile(backend="memopt", options=...)``.
        mode: as for ``torch.compile``.
        dynamic: as for ``torch.compile``.
        **kwargs: its keyword inputs.

    Raises:
        ConfigError: an option is unknown or impossible.
        BudgetInfeasibleError: no plan fits.
    """
    config = read_options(options, mode=mode)
    records: list[GraphRecord] = []

    def note(record: GraphRecord) -> None:
        records.append(dataclasses.replace(record, id=f"graph {len(records)}"))

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Compiled:
        return compile_graph(gm, example_inputs, config, note)

    forward = model.forward if isinstance(model, nn.Module) else model
    compiled = torch.compile(forward, backend=backend, dynamic=dynamic)
    try:
        compiled(*inputs, **kwargs)
    except BackendCompilerFailed as error:
        if error.inner_exception is not None:
            raise error.inner_exception from None
        raise
    report = Report(tuple(records))
    if any(row.kind == Compress.kind for graph in records for row in graph.decisions):
        exact: dict[str, Any] = {
            "passes": {**config.passes, Compress.name: False},
            "memory_budget": "min",
        }
        reference = torch.compile(
            forward, backend="memopt", dynamic=dynamic, options={**dict(options or {}), **exact}
        )
        off = _gradient_error((compiled, reference), model, inputs, kwargs)
        report = dataclasses.replace(report, gradient_error=off)
        allowed = configure(Compress(), config).error
        if off > allowed:
            warnings.warn(
                f"the gradient is off by {off:.1e} of its norm on these inputs, and the pass "
                f"'compress' allows {allowed:.1e}: allow fewer values by a lower 'error', hold "
                f"them in 8 bits, or switch the pass off",
                stacklevel=2,
            )
    return report


def _gradient_error(
    steps: tuple[Callable[..., Any], Callable[..., Any]],
    model: Any,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> float:
    """How far the first step's gradient is from the second's, over the norm of that.

    Of the loss, if the outputs have a scalar, or else of the sum of their squares, by every leaf
    that it has a gradient for. Buffers are as they were afterwards.
    """
    given = pytree.tree_leaves((model, inputs, kwargs))
    modules = [m for m in given if isinstance(m, nn.Module)]
    buffers = [(buffer, buffer.clone()) for m in modules for buffer in m.buffers()]
    leaves: list[torch.Tensor] = []
    found = []
    for step in steps:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = _scalar(step(*inputs, **kwargs))
        leaves = leaves or _leaves(loss)
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    off = total = 0.0
    for mine, exact in zip(*found, strict=True):
        if mine is not None and exact is not None:
            off += float((mine.double() - exact.double()).square().sum())
            total += float(exact.double().square().sum())
    return (off / total) ** 0.5 if total else 0.0


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """What a loss has gradients for, wherever it comes from: inputs, parameters, closures."""
    leaves, todo, seen = [], [loss.grad_fn], {None}
    while todo:
        node: Any = todo.pop()
        if node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            todo += [before for before, _ in node.next_functions]
    return leaves


def _scalar(outputs: Any) -> torch.Tensor:
    """The loss of what a model returned."""
    values = [
        t
        for t in pytree.tree_leaves(outputs)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad
    ]
    scalars = [t for t in values if not t.dim()]
    return scalars[0] if scalars else torch.stack([t.square().sum() for t in values]).sum()
