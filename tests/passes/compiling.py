"""Compiles a function with the pass for losses: its graph, its result and what is said of it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx

from memopt.backend import compile_graph, read_options
from memopt.passes import PRE_GRAD
from memopt.pipeline import PassContext, Pipeline
from memopt.record import GraphRecord
from tests.references import assert_draws_within_reference_error


class Trained(Protocol):
    """Named tensors, some of which are trained."""

    @property
    def trained(self) -> list[Tensor]: ...


Inputs = TypeVar("Inputs", bound=Trained)


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers in another dtype: new leaves, trained where the given ones are."""
    kind: Any = type(inputs)
    other: Inputs = kind(dtype)
    for name, value in vars(inputs).items():
        own = value.detach().to(dtype) if value.is_floating_point() else value
        setattr(other, name, own.requires_grad_(value.requires_grad))
    return other


def options(**chunk: Any) -> dict[str, Any]:
    """Options of memopt in which a failing pass raises; ``chunk`` is those of the pass."""
    return {"lowering": "eager", "strict": True, "passes": {"chunk_losses": chunk or True}}


def compiled(
    function: Callable[..., Any], *, dynamic: bool | None = False, **chunk: Any
) -> tuple[Callable[..., Any], list[GraphRecord]]:
    """The function, and what is said of each of its graphs once it has run.

    Args:
        function: any.
        dynamic: whether shapes are symbolic; None for those that change.
        chunk: options of the pass.
    """
    torch._dynamo.reset()
    config, records = read_options(options(**chunk)), list[GraphRecord]()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, inputs, config, records.append)

    return torch.compile(function, backend=backend, dynamic=dynamic), records


def run_compiled(
    function: Callable[..., Any], *args: Any, **chunk: Any
) -> tuple[Any, list[GraphRecord]]:
    """The result of one call, and what was said of each graph."""
    own, records = compiled(function, **chunk)
    return own(*args), records


def rewritten(function: Callable[..., Any], *args: Any, **chunk: Any) -> fx.Graph:
    """The one graph of a function after the passes that run on Dynamo's."""
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        Pipeline("pre_grad", PRE_GRAD).run(gm, PassContext(read_options(options(**chunk))))
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(*args)
    (graph,) = graphs
    return graph


def argument(node: fx.Node, name: str) -> Any:
    """What an operator of memopt is given by that name, in whatever position."""
    target: Any = node.target
    overload = target if isinstance(target, torch._ops.OpOverload) else target.default
    names = [own.name for own in overload._schema.arguments]
    return node.kwargs[name] if name in node.kwargs else node.args[names.index(name)]


def assert_declined(record: GraphRecord, reason: str, pass_name: str = "chunk_losses") -> None:
    """The pass rewrote nothing, and its remarks give the reason and where the code stands."""
    assert record.rewrites[pass_name] == 0
    said = [r for r in record.remarks if r.pass_name == pass_name]
    assert any(reason in r.text for r in said), said
    assert all(r.source for r in said)


def assert_close(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Equal in float64, but for the order of sums; no gradient where none is expected."""
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def run(function: Callable[[Inputs], Any], inputs: Inputs, upstream: float = 1.0) -> list[Tensor]:
    """All results, and the gradients that the first one has, of what is trained."""
    for tensor in inputs.trained:
        tensor.grad = None
    result = function(inputs)
    results = result if isinstance(result, tuple) else (result,)
    torch.autograd.backward(results[0], torch.full_like(results[0], upstream))
    gradients = [t.grad.clone() for t in inputs.trained if t.grad is not None]
    return [*(r.detach() for r in results), *gradients]


def assert_as_eager(
    function: Callable[[Inputs], Any], inputs: Inputs, upstream: float = 1.0, **chunk: Any
) -> GraphRecord:
    """Compiled, it gives eager's results and gradients; what is said of its one graph."""
    own, records = compiled(function, **chunk)
    actual, expected = run(own, inputs, upstream), run(function, inputs, upstream)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    assert_close(actual, expected)
    (record,) = records
    return record


def assert_near_float64(
    function: Callable[[Inputs], Any],
    draw: Callable[[], Inputs],
    draws: int = 5,
    *,
    plain: Callable[[Inputs], Any] | None = None,
    exact: Callable[[Inputs], Any] | None = None,
    **chunk: Any,
) -> GraphRecord:
    """Compiled, its results and gradients are as near to those in float64 as eager's.

    Args:
        function: what is compiled.
        draw: makes inputs in low precision.
        draws: how many.
        plain: what says how far off results may be, in place of the function.
        exact: what gives the exact ones, in place of ``plain``.
        chunk: options of the pass.

    Returns:
        What is said of the one graph.
    """
    own, records = compiled(function, **chunk)
    low = plain or function
    high = exact or low

    def sides() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = draw()
        actual, expected = run(own, inputs), run(low, inputs)
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        return actual, run(high, converted(inputs, torch.float64)), expected

    assert_draws_within_reference_error(sides, draws)
    (record,) = records
    return record
