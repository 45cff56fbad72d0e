"""What the pipeline does for every pass: contracts, checks, undoing, names in the cache key."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from memopt.backend import compile_graph, read_options
from memopt.config import Config
from memopt.errors import PipelineError
from memopt.pipeline import Pass, PassContext, Pipeline
from memopt.remarks import RemarkKind

NOTHING: frozenset[str] = frozenset()


def make_pass(
    name: str,
    rewrite: Callable[[fx.Graph], int] = lambda graph: 0,
    *,
    requires: frozenset[str] = NOTHING,
    establishes: frozenset[str] = NOTHING,
) -> Pass:
    """A pass of one function."""
    given = (name, requires, establishes)

    @dataclass(frozen=True)
    class Made:
        name: ClassVar[str] = given[0]
        requires: ClassVar[frozenset[str]] = given[1]
        establishes: ClassVar[frozenset[str]] = given[2]
        strength: int = 1

        def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
            ctx.remark(self.name, RemarkKind.APPLIED, f"strength {self.strength}")
            return rewrite(graph)

    return Made()


def module() -> fx.GraphModule:
    """``sin(x)`` with traced values."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.sin, (x,))
    graph.output(y)
    for node in (x, y):
        node.meta["val"] = torch.empty(2, device="meta")
    return fx.GraphModule(torch.nn.Module(), graph)


def sine_to_cosine(graph: fx.Graph) -> int:
    (sine,) = graph.find_nodes(op="call_function", target=torch.sin)
    sine.target = torch.cos
    return 1


def raises(graph: fx.Graph) -> int:
    sine_to_cosine(graph)
    raise RuntimeError("half way through")


def forgets_the_value(graph: fx.Graph) -> int:
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.neg, (output.args[0],)),)
    return 1


def uses_before_definition(graph: fx.Graph) -> int:
    (sine,) = graph.find_nodes(op="call_function", target=torch.sin)
    (x,) = graph.find_nodes(op="placeholder")
    with graph.inserting_before(x):
        early = graph.call_function(torch.neg, (sine,))
    early.meta["val"] = sine.meta["val"]
    graph.find_nodes(op="output")[0].args = (early,)
    return 1


BROKEN = [raises, forgets_the_value, uses_before_definition]


def context(**options: Any) -> PassContext:
    return PassContext(Config.from_options(options))


def test_a_pass_runs_and_its_rewrites_are_counted() -> None:
    gm, ctx = module(), context()
    Pipeline("test", [make_pass("turn", sine_to_cosine), make_pass("idle")]).run(gm, ctx)
    assert torch.equal(gm(torch.zeros(2)), torch.ones(2))
    assert ctx.rewrites == {"turn": 1, "idle": 0}


def test_a_requirement_that_nothing_earlier_establishes_is_refused() -> None:
    needs = make_pass("needs", requires=frozenset({"views_gone"}))
    gives = make_pass("gives", establishes=frozenset({"views_gone"}))
    Pipeline("test", [gives, needs])
    with pytest.raises(PipelineError, match=r"'needs'.*'views_gone'"):
        Pipeline("test", [needs, gives])


def test_two_passes_of_one_name_are_refused() -> None:
    with pytest.raises(PipelineError, match="'same'"):
        Pipeline("test", [make_pass("same"), make_pass("same")])


@pytest.mark.parametrize("rewrite", BROKEN)
def test_a_pass_that_fails_is_undone_with_one_warning_and_one_remark(
    rewrite: Callable[[fx.Graph], int],
) -> None:
    gm, ctx = module(), context()
    after = make_pass("after", sine_to_cosine)
    with pytest.warns(UserWarning, match="'bad' was undone") as caught:
        Pipeline("test", [make_pass("bad", rewrite), after]).run(gm, ctx)
    assert len(caught) == 1
    assert [(r.pass_name, r.kind) for r in ctx.remarks] == [
        ("bad", RemarkKind.MISSED),
        ("after", RemarkKind.APPLIED),
    ]
    assert ctx.rewrites == {"after": 1}
    assert torch.equal(gm(torch.zeros(2)), torch.ones(2))  # "after" found the sine again


@pytest.mark.parametrize("rewrite", BROKEN)
def test_an_undone_pass_leaves_a_module_that_runs_as_before(
    rewrite: Callable[[fx.Graph], int],
) -> None:
    gm = module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Pipeline("test", [make_pass("bad", rewrite)]).run(gm, context())
    assert [n.name for n in gm.graph.nodes] == ["x", "sin", "output"]
    assert torch.equal(gm(torch.ones(2)), torch.ones(2).sin())


@pytest.mark.parametrize("rewrite", BROKEN)
def test_strict_raises(rewrite: Callable[[fx.Graph], int]) -> None:
    with pytest.raises((RuntimeError, PipelineError)):
        Pipeline("test", [make_pass("bad", rewrite)]).run(module(), context(strict=True))


def test_a_pass_that_is_switched_off_says_so_and_does_nothing() -> None:
    gm, ctx = module(), context(passes={"turn": False})
    Pipeline("test", [make_pass("turn", sine_to_cosine)]).run(gm, ctx)
    assert torch.equal(gm(torch.zeros(2)), torch.zeros(2))
    assert [(r.pass_name, r.text) for r in ctx.remarks] == [
        ("turn", "switched off by options['passes']")
    ]


def test_a_pass_gets_the_options_given_for_it() -> None:
    ctx = context(passes={"idle": {"strength": 7}})
    Pipeline("test", [make_pass("idle")]).run(module(), ctx)
    assert [r.text for r in ctx.remarks] == ["strength 7"]


def test_the_cache_key_names_enabled_passes_and_their_options() -> None:
    pipeline = Pipeline("test", [make_pass("one"), make_pass("two")])
    settings: list[dict[str, object]] = [{}, {"one": False}, {"one": {"strength": 2}}]
    keys = [pipeline.uuid(Config.from_options({"passes": s})) for s in settings]
    assert len(set(keys)) == len(keys)
    again = Pipeline("test", [make_pass("one"), make_pass("two")])
    assert again.uuid(Config()) == keys[0]
    assert Pipeline("other", again.passes).uuid(Config()) != keys[0]


def test_an_in_place_method_survives_the_removal_of_dead_code() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_method("add_", (x, 1))
    idle = graph.call_method("add", (x, 1))  # had no readers before any pass came
    y = graph.call_function(torch.sin, (x,))
    graph.output(y)
    for node in graph.nodes:
        node.meta["val"] = torch.empty(2, device="meta")
    gm = fx.GraphModule(torch.nn.Module(), graph)
    Pipeline("test", [make_pass("turn", sine_to_cosine)]).run(gm, context())
    names = [n.name for n in gm.graph.nodes]
    assert "add_" in names
    assert idle.name in names
    x0 = torch.zeros(2)
    assert torch.equal(gm(x0), torch.ones(2).cos())
    assert torch.equal(x0, torch.ones(2))


class Ramp(torch.autograd.Function):
    """Identity whose backward writes in place, as transformers' mixture routers do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (g,) = gradients
        total = torch.zeros_like(g)
        total.scatter_add_(0, torch.arange(len(g)), g)
        return total


def ramp(x: torch.Tensor) -> Any:
    return (Ramp.apply(x) * 2).sum()  # type: ignore[no-untyped-call]


def test_dead_code_in_the_body_of_an_autograd_function_is_none_of_ours() -> None:
    """Torch's own elimination descends into the body and drops the ``scatter_add_``."""
    dead = Pipeline("test", [make_pass("counts", lambda graph: 1)])

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        dead.run(gm, PassContext(Config()))
        return gm.forward

    x = torch.randn(5, requires_grad=True)
    compiled = torch.compile(ramp, backend=backend)
    (gradient,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(gradient, torch.full((5,), 2.0))


def test_levels_of_vmap_and_writes_survive_the_removal_of_dead_code() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.vmap(lambda row: row * 2)(x)
        y[0] = 3.0
        return y

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        Pipeline("test", [make_pass("counts", lambda graph: 1)]).run(gm, PassContext(Config()))
        return gm.forward

    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(function, backend=backend)(x), function(x))


def test_a_wrapper_of_an_undone_pass_is_taken_off_again() -> None:
    def fails(graph: fx.Graph) -> int:
        ctx.wrappers.append(lambda compiled: compiled)
        raise ValueError("late")

    ctx = PassContext(Config())
    with pytest.warns(UserWarning, match="late"):
        Pipeline("test", [make_pass("fails", fails)]).run(module(), ctx)
    assert ctx.wrappers == []


def test_an_undone_pass_leaves_a_dynamo_graph_that_compiles() -> None:
    def fails(graph: fx.Graph) -> int:
        raise ValueError("late")

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        with pytest.warns(UserWarning, match="late"):
            Pipeline("pre_grad", [make_pass("fails", fails)]).run(gm, PassContext(Config()))
        return compile_graph(gm, inputs, read_options({"lowering": "eager"}))

    x = torch.randn(3, requires_grad=True)
    assert torch.equal(torch.compile(lambda x: x.sin(), backend=backend)(x), x.sin())
