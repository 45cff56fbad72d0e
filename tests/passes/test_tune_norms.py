"""A layer's result is not held for the scale behind it, and every gradient is what it was."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import memopt
from memopt.backend import read_options
from memopt.lowering import interpret_planned, lower_eagerly
from memopt.passes.tune_norms import TuneNorms
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind
from memopt.splitting import Splitter
from tests.passes.scaled_layers import (
    IMAGE,
    LEFT_ALONE,
    REWRITTEN,
    Build,
    Scaled,
    frozen_layer,
    with_statistics,
)
from tests.references import (
    assert_draws_within_reference_error,
    assert_equal_in_float64,
    assert_same_bits,
)

ON: dict[str, Any] = {TuneNorms.name: True}
LOWERINGS = ("eager", "decomposed")


def compiled(model: Any, lowering: str, **options: Any) -> tuple[Any, PassContext]:
    """The model, and what was said of its one graph; as Inductor's graphs are, or eager's.

    ``decomposed`` plans the graph that Inductor is given, and interprets it.
    """
    torch._dynamo.reset()
    kind = "eager" if lowering == "eager" else "inductor"
    config = read_options({"lowering": kind, "strict": True, "passes": ON, **options})
    ctx = PassContext(config)
    lower = lower_eagerly if lowering == "eager" else interpret_planned

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return lower(gm, inputs, Splitter(config, ctx))

    return torch.compile(model, backend=backend), ctx


def results(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The result of a run, and the gradients of the input and of all that is trained."""
    x = x.clone().requires_grad_()
    y = run(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *trained])]


def compare(build: Build, shape: tuple[int, ...], lowering: str) -> PassContext:
    torch.manual_seed(0)
    model = with_statistics(build())
    x = torch.randn(shape, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = results(model, model, x)
    model.load_state_dict(start)
    run, ctx = compiled(model, lowering)
    actual = results(run, model, x)
    assert_equal_in_float64(actual, expected)
    return ctx


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", REWRITTEN)
def test_every_gradient_is_eager_s_where_the_scale_s_is_made_another_way(
    name: str, lowering: str
) -> None:
    build, shape, count = REWRITTEN[name]
    assert compare(build, shape, lowering).rewrites[TuneNorms.name] == count


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone(name: str, lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = TuneNorms.__call__

    def watched(self: TuneNorms, graph: fx.Graph, ctx: PassContext) -> int:
        before = str(graph)
        rewrites = rewrite(self, graph, ctx)
        assert str(graph) == before
        return rewrites

    monkeypatch.setattr(TuneNorms, "__call__", watched)
    build, shape = LEFT_ALONE[name]
    assert compare(build, shape, lowering).rewrites[TuneNorms.name] == 0


def pair(bias: bool = False) -> nn.Module:
    """Two convolutions, each with a norm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(),
    )  # fmt: skip


def explained(model: nn.Module, x: Tensor, lowering: str, **passes: bool) -> Any:
    torch._dynamo.reset()
    options = {"lowering": lowering, "passes": {**ON, **passes}, "strict": True}
    (graph,) = memopt.explain(model, x, options=options).graphs
    return graph


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_no_convolution_s_result_is_held(lowering: str) -> None:
    model, x = with_statistics(pair()), torch.randn(IMAGE, dtype=torch.float64)
    tuned = explained(model, x, lowering)
    plain = explained(model, x, lowering, **{TuneNorms.name: False})
    one = model[0](x)
    two = model[3](one)
    assert tuned.rewrites[TuneNorms.name] == 2
    assert plain.saved_bytes - tuned.saved_bytes == one.nbytes + two.nbytes


def test_a_layer_scale_holds_no_result_of_its_layer() -> None:
    model = nn.Sequential(*(Scaled(nn.Linear(6, 6)) for _ in range(3))).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    tuned = explained(model, x, "eager")
    plain = explained(model, x, "eager", **{TuneNorms.name: False})
    assert tuned.rewrites[TuneNorms.name] == 3
    assert plain.saved_bytes - tuned.saved_bytes == 3 * x.nbytes


def test_inductor_s_code_gives_eager_s_gradients_too() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(pair(bias=True)), torch.randn(IMAGE, dtype=torch.float64)
    options: Any = {"strict": True, "passes": ON}
    run = torch.compile(model, backend="memopt", options=options)
    assert_equal_in_float64(results(run, model, x), results(model, model, x))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_forward_is_the_same_to_the_bit(lowering: str) -> None:
    torch.manual_seed(0)
    model, x = with_statistics(pair(bias=True)).float(), torch.randn(IMAGE)
    runs = [compiled(model, lowering, passes={TuneNorms.name: on})[0] for on in (True, False)]
    tuned = runs[0](x).detach()
    assert_same_bits([tuned], [runs[1](x).detach()])


def tuned_by_hand(model: Any, x: Tensor) -> Tensor:
    """What a `pair` gives, with each convolution and norm written as one convolution."""
    for convolution, norm in ((model[0], model[1]), (model[3], model[4])):
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias + (convolution.bias - norm.running_mean) * scale
        weight = convolution.weight * scale.view(-1, 1, 1, 1)
        x = F.conv2d(x, weight, shift, convolution.stride).relu()
    return x


def test_in_float32_gradients_are_as_near_to_float64_as_plain_code_s() -> None:
    """As those of eager's norms or of the convolutions by hand, whichever are further off."""
    torch.manual_seed(0)

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        model, x = with_statistics(pair(bias=True)), torch.randn(16, 3, 24, 24).double()
        exact = results(model, model, x)[1:]
        model, x = model.float(), x.float()
        run, ctx = compiled(model, "decomposed")
        actual = results(run, model, x)[1:]
        assert ctx.rewrites[TuneNorms.name] == 2
        eager = results(model, model, x)[1:]
        by_hand = results(lambda x: tuned_by_hand(model, x), model, x)[1:]
        plain = [
            max(pair, key=lambda gradient: (gradient - right).norm())
            for *pair, right in zip(eager, by_hand, exact, strict=True)
        ]
        return actual, exact, plain

    assert_draws_within_reference_error(draw)


def test_the_gradient_of_a_shift_is_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(pair(bias=True)).float(), torch.randn(IMAGE)
    runs = [compiled(model, "decomposed", passes={TuneNorms.name: on})[0] for on in (True, False)]
    mine, plain = (results(run, model, x)[-1:] for run in runs)
    assert_same_bits(mine, plain)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_changes_before_the_norm_runs_is_refused_as_in_eager(what: str) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.convolution(x)
            with torch.no_grad():
                (x if what == "input" else self.convolution.weight).mul_(2)
            result: Tensor = self.norm(y).relu()
            return result

    model = with_statistics(Changed())
    for run in (model, compiled(model, "eager")[0]):
        with pytest.raises(Exception, match="modified by an inplace operation"):
            run(torch.randn(IMAGE).double()).sum().backward()


def test_in_low_precision_results_are_held_and_a_remark_says_why() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 5, 3).bfloat16()
            self.norm = nn.BatchNorm2d(5).eval()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(self.convolution(x).float()).relu()
            return result

    model, x = Mixed(), torch.randn(IMAGE, dtype=torch.bfloat16)
    for lowering in LOWERINGS:
        plain, _ = compiled(model, lowering, passes={TuneNorms.name: False})
        expected = results(plain, model, x)
        run, ctx = compiled(model, lowering)
        assert_same_bits(results(run, model, x), expected)
        assert ctx.rewrites[TuneNorms.name] == 0
    (said,) = [r for r in ctx.remarks if r.pass_name == TuneNorms.name]
    assert said.kind is RemarkKind.MISSED
    assert "bfloat16" in said.text


def test_a_remark_says_that_a_frozen_layer_s_result_is_held() -> None:
    (said,) = [
        r
        for r in compare(frozen_layer, IMAGE, "decomposed").remarks
        if r.pass_name == TuneNorms.name
    ]
    assert said.kind is RemarkKind.MISSED
    assert "frozen" in said.text


def test_an_input_that_needs_no_gradient_changes_nothing_else() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(pair()), torch.randn(IMAGE, dtype=torch.float64)
    trained = [*model.parameters()]
    for lowering in LOWERINGS:
        run, ctx = compiled(model, lowering)
        mine, plain = (torch.autograd.grad(f(x).square().sum(), trained) for f in (run, model))
        assert_equal_in_float64(mine, plain)
        assert ctx.rewrites[TuneNorms.name] == 2


def test_a_batch_of_any_size_is_tuned_too() -> None:
    torch.manual_seed(0)
    model = with_statistics(pair(bias=True))
    run, ctx = compiled(model, "eager")
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 9, 9, dtype=torch.float64)
        assert_equal_in_float64(results(run, model, x), results(model, model, x))
    assert ctx.rewrites[TuneNorms.name] == 4  # of one shape, then of any


def test_without_a_budget_it_runs_where_it_is_named_alone() -> None:
    model, x = with_statistics(pair()), torch.randn(IMAGE, dtype=torch.float64)
    rewrites = []
    unnamed: dict[str, Any] = {"passes": {}}
    for options in (unnamed, {**unnamed, "memory_budget": 0.9}, {"passes": ON}):
        run, ctx = compiled(model, "eager", **options)
        run(x)
        rewrites.append(ctx.rewrites[TuneNorms.name])
    assert rewrites == [0, 2, 2]
