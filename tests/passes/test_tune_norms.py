"""A layer's result is not held for the scale behind it, and every gradient is what it was."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import memopt
from memopt.backend import read_options
from memopt.lowering import interpret_planned, lower_eagerly
from memopt.passes.tune_norms import TuneNorms
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind
from memopt.splitting import Splitter
from tests.references import (
    assert_draws_within_reference_error,
    assert_equal_in_float64,
    assert_same_bits,
)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ON: dict[str, Any] = {TuneNorms.name: True}
Build = Callable[[], nn.Module]


def with_statistics(model: nn.Module) -> Any:
    """In float64 and with norms in eval mode, of which one channel has a scale of 0."""
    model.double()
    for module in model.modules():
        if isinstance(module, NORMS):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                with torch.no_grad():
                    module.weight[0] = 0
            module.eval()
    return model


def stack(*layers: nn.Module) -> Build:
    return lambda: nn.Sequential(*layers)


class Functional(nn.Module):
    """A convolution called by keywords, and a norm as detectors write it."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3, 3, 3))
        self.offset = nn.Parameter(torch.randn(5))
        self.weight, self.bias = (nn.Parameter(torch.randn(5)) for _ in range(2))
        self.register_buffer("running_mean", torch.randn(5))
        self.register_buffer("running_var", torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(weight=self.kernel, padding=1, input=x, stride=2, bias=self.offset)
        weight, bias, mean, variance = (
            v.reshape(1, -1, 1, 1)
            for v in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + 1e-5).rsqrt()
        return y * scale + (bias - mean * scale)


class Scaled(nn.Module):
    """A layer scale behind a linear layer, as vision transformers have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layer(x) * self.scale
        return result


class Turned(nn.Module):
    """A linear layer whose features a norm takes for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.linear(x).transpose(1, 2)).relu()
        return result


class Twice(nn.Module):
    """One convolution and one norm, for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(self.convolution(x)).relu()
        return x


class Checkpointed(nn.Module):
    """A block that is run again by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.body, self.first(x), use_reentrant=False)
        return result


class MovingBias(nn.Module):
    """A convolution's bias that has changed by the time the norm runs, and the backward."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.register_buffer("bias", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.convolution.weight, self.bias)
        self.bias.add_(1)
        result: Tensor = self.norm(y).relu()
        return result


IMAGE = (2, 3, 9, 8)
REWRITTEN: dict[str, tuple[Build, tuple[int, ...], int]] = {
    "a line": (stack(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU()), (2, 3, 11), 1),
    "images": (
        stack(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU(),
        ),
        IMAGE, 2,
    ),
    "a volume": (stack(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Tanh()), (2, 2, 4, 5, 3), 1),
    "groups": (stack(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6), 1),
    "each channel": (stack(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE, 1),
    "one channel": (stack(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)), IMAGE, 1),
    "transposed": (
        stack(nn.ConvTranspose2d(3, 5, 3, 2, output_padding=1), nn.BatchNorm2d(5)), IMAGE, 1,
    ),
    "transposed in groups": (
        stack(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5), 1,
    ),
    "transposed, each channel": (
        stack(nn.ConvTranspose1d(4, 4, 3, groups=4), nn.BatchNorm1d(4)), (2, 4, 7), 1,
    ),
    "features": (stack(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), (7, 4), 1),
    "features, turned": (Turned, (2, 5, 4), 1),
    "by keywords": (Functional, IMAGE, 1),
    "a layer scale": (lambda: Scaled(nn.Linear(6, 6)), (2, 5, 6), 1),
    "a layer scale, no bias": (lambda: Scaled(nn.Linear(6, 6, bias=False)), (7, 6), 1),
    "twice": (Twice, IMAGE, 2),
    "a checkpoint": (Checkpointed, IMAGE, 1),
    "another use": (lambda: Beside((5, 1, 1), lambda y: y), IMAGE, 1),
    "steps in between": (lambda: Between(steps), IMAGE, 1),
    "a bias that moves": (MovingBias, IMAGE, 1),
}  # fmt: skip


class Shared(nn.Module):
    """One convolution's result, under two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3)
        self.one, self.two = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        result: Tensor = self.one(y).relu() * self.two(y)
        return result


class Beside(nn.Module):
    """A layer's gradient that is right for one use of its result, and a number for another use."""

    def __init__(self, shape: tuple[int, ...], other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)
        self.scale, self.other = nn.Parameter(torch.randn(shape)), other

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        result: Tensor = y * 3 + self.other(y.detach()) * self.scale
        return result


class Between(nn.Module):
    """Something between a convolution and its norm."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.norm, self.between = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), between

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.between(self.convolution(x))).relu()
        return result


def steps(y: Tensor) -> Tensor:
    """Every kind of step by channel."""
    channel = torch.arange(1, 6, dtype=y.dtype).view(-1, 1, 1)
    return channel - 0.5 * (-y / channel - 2 * channel).add(channel)


def without_affine() -> nn.Module:
    norm = nn.BatchNorm2d(5)
    norm.requires_grad_(False)
    return nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.ReLU())


def frozen_layer() -> nn.Module:
    frozen = nn.Conv2d(5, 4, 3).requires_grad_(False)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), frozen, nn.BatchNorm2d(4), nn.ReLU())


class InTraining(nn.BatchNorm2d):
    """A norm that no one can put in eval mode."""

    def train(self, mode: bool = True) -> "InTraining":
        super().train(True)
        return self


class Added(nn.Module):
    """A product that is added to another for each row, under one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x, x, self.weight) * self.scale


LEFT_ALONE: dict[str, tuple[Build, tuple[int, ...]]] = {
    "statistics of the batch": (stack(nn.Conv2d(3, 5, 3), InTraining(5), nn.ReLU()), IMAGE),
    "no affine": (stack(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU()), IMAGE),
    "a frozen affine": (without_affine, IMAGE),
    "a frozen layer": (frozen_layer, IMAGE),
    "positions for channels": (stack(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.ReLU()), (2, 5, 4)),
    "as many positions": (stack(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), (2, 6, 4)),
    "rows for channels": (
        stack(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm1d(5), nn.ReLU()), (3, 5, 7),
    ),
    "two norms": (Shared, IMAGE),
    "a transpose": (
        lambda: Beside((5, 1, 1), lambda y: y.transpose(2, 3)), (2, 3, 6, 6),
    ),
    "a scale for each image": (lambda: Beside((2, 5, 1, 1), lambda y: y), (2, 3, 6, 6)),
    "what differs within a channel": (
        lambda: Between(lambda y: y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)), IMAGE,
    ),
    "another sum in each row": (Added, (6, 6)),
    "a large weight": (stack(nn.Linear(40, 6), nn.BatchNorm1d(6)), (9, 40)),
}  # fmt: skip
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
