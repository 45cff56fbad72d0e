"""Queries and keys that nothing else reads are turned in their own memory, and no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import memopt
from bench.meter import Meter
from memopt.backend import read_options
from memopt.kernels.rotary import ROTARY, ROTARY_IN_PLACE
from memopt.passes.overwrite_rotary import OverwriteRotary
from memopt.pipeline import PassContext, Pipeline
from memopt.remarks import RemarkKind
from tests.passes.rotary_forms import turned

NAME = "overwrite_rotary"
LOWERINGS = ["eager", "inductor"]
BATCH, HEADS, LENGTH, SIZE = 2, 4, 4, 8  # as many heads as positions: transposing keeps the shape
WIDTH = HEADS * SIZE

Function = Callable[..., Any]


def rewritten(
    function: Function, inputs: list[Tensor], lowering: str = "eager"
) -> tuple[fx.GraphModule, PassContext]:
    """The graph of a function behind the pass, which changes neither results nor inputs."""
    gm: fx.GraphModule = make_fx(function, tracing_mode="fake")(*inputs)
    expected = gm(*inputs)
    ctx = PassContext(read_options({"lowering": lowering, "strict": True}))
    Pipeline("post_grad", (OverwriteRotary(),)).run(gm, ctx)
    before = [t.clone() for t in inputs]
    results = gm(*inputs)
    assert all(map(torch.equal, results, expected))
    assert all(map(torch.equal, inputs, before))
    (output,) = gm.graph.find_nodes(op="output")
    seen = [n.meta["val"] for n in output.args[0]]
    assert [t.stride() for t in seen] == [t.stride() for t in results]
    assert _shared(seen) == _shared(results)
    left = gm.graph.find_nodes(op="call_function", target=ROTARY)
    done = gm.graph.find_nodes(op="call_function", target=ROTARY_IN_PLACE)
    said = [r.kind for r in ctx.remarks if r.pass_name == NAME]
    assert said.count(RemarkKind.APPLIED) == len(done) == ctx.rewrites[NAME]
    assert said.count(RemarkKind.MISSED) == len(left)
    return gm, ctx


def _shared(tensors: list[Tensor]) -> list[int]:
    """For each tensor, the first one in the same memory."""
    places = [t.untyped_storage()._cdata for t in tensors]
    return [places.index(place) for place in places]


def tables(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    angles = torch.rand(1, LENGTH, SIZE // 2) * 6
    return [angles.cos().to(dtype), angles.sin().to(dtype)]


def drawn(columns: int = WIDTH) -> list[Tensor]:
    """States, a weight, and tables."""
    states = torch.randn(BATCH * LENGTH, WIDTH)
    return [states, torch.randn(WIDTH, columns) / WIDTH**0.5, *tables()]


def split(x: Tensor, count: int = HEADS) -> Tensor:
    return x.view(BATCH, LENGTH, count, -1).transpose(1, 2)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = ROTARY(q, k, cos, sin, SIZE, False, False)
    return results


def products(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return split(x @ w), split(x @ w.t())


def packed(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values beside one another."""
    return torch.split(split(x @ w, 3 * HEADS), HEADS, 1)


def from_products(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = turn(*products(x, w), cos, sin)
    return [q @ k.transpose(2, 3), k]


def from_norms(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = (F.layer_norm(t, (SIZE,)) for t in products(x, w))
    return list(turn(q, k, cos, sin))


def from_sums(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = (t.reshape(BATCH, HEADS, 1, LENGTH, SIZE).sum(2) for t in products(x, w))
    return list(turn(q, k, cos, sin))


def alone(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q = split(x @ w)
    return [turn(q, q[:, :0], cos, sin)[0]]


def twice(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    return list(turn(*turn(*products(x, w), cos, sin), sin, cos))


PLAIN = {"products": from_products, "norms": from_norms, "sums": from_sums, "alone": alone}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("form", PLAIN)
def test_what_dies_in_the_operator_is_overwritten(form: str, lowering: str) -> None:
    _, ctx = rewritten(PLAIN[form], drawn(), lowering)
    assert ctx.rewrites[NAME] == 1


def test_a_result_may_be_overwritten_in_turn() -> None:
    gm, ctx = rewritten(twice, drawn())
    assert ctx.rewrites[NAME] == 2
    assert len({n.args[0] for n in gm.graph.nodes if n.target is ROTARY_IN_PLACE}) == 1


def attended(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k, v = packed(x, w)
    return [F.scaled_dot_product_attention(*turn(q, k, cos, sin), v)]


def values_first(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k, v = packed(x, w)
    looked_at = v.exp()
    q, k = turn(q, k, cos, sin)
    return [F.scaled_dot_product_attention(q, k, looked_at), v.sum()]


def by_head(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """As GPT-NeoX packs them: queries, keys and values of each head."""
    q, k, v = split(x @ w).chunk(3, dim=-1)
    return [F.scaled_dot_product_attention(*turn(q, k, cos, sin), v)]


def stacked(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """As vision transformers pack them."""
    q, k, v = (x @ w).view(BATCH, LENGTH, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
    return [F.scaled_dot_product_attention(*turn(q, k, cos, sin), v)]


def repeated_keys(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k, v = packed(x, w)
    q, k = turn(q, k[:, :2], cos, sin)
    k = k[:, :, None].expand(-1, -1, HEADS // 2, -1, -1).reshape(q.shape)
    return [F.scaled_dot_product_attention(q, k, v)]


PACKED = {f.__name__: f for f in (attended, values_first, by_head, stacked, repeated_keys)}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("form", PACKED)
def test_parts_of_a_product_are_overwritten_beside_what_is_read(form: str, lowering: str) -> None:
    with torch.no_grad():
        _, ctx = rewritten(PACKED[form], drawn(3 * WIDTH), lowering)
    assert ctx.rewrites[NAME] == 1


def saved_with_values(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k, v = packed(x, w)
    q, k = turn(q, k, cos, sin)
    return [F.scaled_dot_product_attention(q, k, v), q, k, v]


def saved_alone(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    return saved_with_values(x, w, cos, sin)[:2]


def test_parts_are_kept_in_a_product_that_is_kept_anyway() -> None:
    gm, ctx = rewritten(saved_with_values, drawn(3 * WIDTH), "inductor")
    assert ctx.rewrites[NAME] == 1
    kept = gm(*drawn(3 * WIDTH))[1:]
    assert len({t.untyped_storage().data_ptr() for t in kept}) == 1


def read_later(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = products(x, w)
    return [*turn(q, k, cos, sin), q.exp()]


def read_earlier(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = products(x, w)
    earlier = k.exp()
    return [*turn(q, k, cos, sin), earlier]


def saved(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = products(x, w)
    return [*turn(q, k, cos, sin), q]


def a_view_saved(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = products(x, w)
    return [*turn(q, k, cos, sin), k.transpose(1, 2)[0]]


def the_product_read(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    product = x @ w
    q, k = turn(split(product), split(x @ w.t()), cos, sin)
    return [q, k, product.sum()]


def the_same(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q = split(x @ w)
    return list(turn(q, q, cos, sin))


def overlapping(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q = split(x @ w)
    return list(turn(q[:, :3], q[:, 1:], cos, sin))


def apart(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    both = split(torch.cat((x @ w, x @ w.t()), -1))
    return list(turn(both[..., ::2], split(x @ w), cos, sin))


def an_input(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    return list(turn(split(x), split(x @ w), cos, sin))


def a_copy(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    return list(turn(split(x @ w), split(x.clone()), cos, sin))


def no_conversion(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    same = torch.ops.prims.convert_element_type(x, torch.float32)
    return list(turn(split(x @ w), split(same), cos, sin))


def reshaped(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = turn(split(x @ w)[:, :2], split(x @ w)[:, 2:], cos, sin)
    return [t.transpose(1, 2).view(BATCH, LENGTH, 2 * SIZE) for t in (q, k)]


def returned(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k, _ = packed(x, w)
    return list(turn(q, k, cos, sin))


READ = "is also read by"
HAZARDS: dict[str, tuple[Function, int, str, str]] = {
    "read later": (read_later, WIDTH, "inductor", READ),
    "read earlier": (read_earlier, WIDTH, "inductor", READ),
    "saved": (saved, WIDTH, "inductor", READ),
    "a view saved": (a_view_saved, WIDTH, "inductor", READ),
    "the product read": (the_product_read, WIDTH, "inductor", READ),
    "the same": (the_same, WIDTH, "inductor", READ),
    "overlapping": (overlapping, WIDTH, "inductor", READ),
    "entries apart": (apart, WIDTH, "inductor", "entries apart"),
    "an input": (an_input, WIDTH, "inductor", "an input or a copy"),
    "a copy": (a_copy, WIDTH, "inductor", "an input or a copy"),
    "no conversion": (no_conversion, WIDTH, "inductor", "an input or a copy"),
    "reshaped": (reshaped, WIDTH, "inductor", "has gaps"),
    "saved in the traced layout": (saved_with_values, 3 * WIDTH, "eager", "has gaps"),
    "saved without the rest": (saved_alone, 3 * WIDTH, "inductor", "is kept"),
    "returned without the rest": (returned, 3 * WIDTH, "inductor", "is kept"),
}


@pytest.mark.parametrize("form", HAZARDS)
def test_what_is_read_elsewhere_or_not_its_own_stays_and_says_why(form: str) -> None:
    function, columns, lowering, why = HAZARDS[form]
    _, ctx = rewritten(function, drawn(columns), lowering)
    assert ctx.rewrites[NAME] == 0
    assert [r for r in ctx.remarks if why in r.text], ctx.remarks


Program = list[tuple[str, int, int]]
# Each makes heads of two earlier values, all of them `(BATCH, HEADS, LENGTH, SIZE)`.
STEPS: dict[str, Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]] = {
    "rotate": lambda a, b, t: list(turn(a, b, *t)),
    "rotate alone": lambda a, b, t: [turn(a, a[:, :0], *t)[0]],
    "product": lambda a, b, t: [split(_rows(a) @ _rows(b).t() @ _rows(b)) / WIDTH],
    "packed": lambda a, b, t: [
        *torch.split(split(_rows(a) @ torch.cat([_square(b)] * 3, 1), 3 * HEADS), HEADS, 1)
    ],
    "by head": lambda a, b, t: [
        *split(_rows(a) @ torch.cat([_square(b)] * 3, 1)).chunk(3, dim=-1)
    ],
    "stack": lambda a, b, t: [*torch.stack([a * 2, b]).unbind(0)],
    "add": lambda a, b, t: [a + b],
    "double": lambda a, b, t: [a * 2],
    "copy": lambda a, b, t: [a.clone()],
    "swap": lambda a, b, t: [a.transpose(1, 2)],
    "expand": lambda a, b, t: [a[:, 1:2].expand(-1, HEADS, -1, -1)],
    "halves": lambda a, b, t: [torch.cat([a[:, :2], b[:, 2:]], 1)],
    "attention": lambda a, b, t: [F.scaled_dot_product_attention(a, b, b)],
}


def _rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(BATCH * LENGTH, WIDTH)


def _square(x: Tensor) -> Tensor:
    return _rows(x).t() @ _rows(x) / WIDTH


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, list[int]]:
    """Steps over recent values, and which values are returned."""
    known, steps = 2, Program()
    for _ in range(draw(st.integers(2, 8))):
        name = draw(st.sampled_from(["rotate", *STEPS]))
        left, right = (draw(st.integers(max(0, known - 4), known - 1)) for _ in range(2))
        steps.append((name, left, right))
        known += {"rotate": 2, "packed": 3, "by head": 3, "stack": 2}.get(name, 1)
    return steps, [known - 1, draw(st.integers(0, known - 1))]


@settings(max_examples=150, deadline=None)
@given(programs(), st.sampled_from(LOWERINGS))
def test_no_program_computes_anything_else(
    program: tuple[Program, list[int]], lowering: str
) -> None:
    steps, outputs = program

    def function(x: Tensor, y: Tensor, *t: Tensor) -> list[Tensor]:
        values = [x, y]
        for name, left, right in steps:
            values += STEPS[name](values[left], values[right], list(t))
        return [values[i] for i in outputs]

    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator) for _ in range(2))
    with torch.no_grad():
        rewritten(function, [*states, *tables()], lowering)


class Attention(nn.Module):
    """One layer, with queries, keys and values of products of their own or of one."""

    def __init__(self, *, one: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.one = one
        self.into = nn.Linear(WIDTH, 3 * WIDTH, bias=False, dtype=dtype)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.one:
            q, k, v = torch.split(self.into(x), WIDTH, -1)
        else:
            q, k, v = (x @ w.t() for w in torch.split(self.into.weight, WIDTH))
        heads = [t.view(BATCH, -1, HEADS, SIZE).transpose(1, 2) for t in (q, k, v)]
        q, k = (turned(t, cos.unsqueeze(1), sin.unsqueeze(1)) for t in heads[:2])
        mixed = F.scaled_dot_product_attention(q, k, heads[2], is_causal=True)
        return x + F.linear(mixed.transpose(1, 2).flatten(2), self.out.weight)


class Model(nn.Module):
    """Two layers, and tables of each angle twice."""

    def __init__(self, *, one: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(one=one, dtype=dtype) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[None, :, None] / torch.arange(1, 1 + SIZE // 2)
        angles = torch.cat((angles, angles), -1)
        for layer in self.layers:
            x = layer(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return x.float().square().mean()


def options(lowering: str, *, on: bool = True) -> dict[str, Any]:
    passes = {"fuse_rotary": {"cpu": True}, NAME: on}
    return {"lowering": lowering, "strict": True, "passes": passes}


def made(*, one: bool, dtype: torch.dtype = torch.float32) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 64, WIDTH, dtype=dtype, requires_grad=True)
    return Model(one=one, dtype=dtype), x


def step(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    x.grad = None
    loss = run(x)
    loss.backward()
    gradients = (t.grad for t in (x, *model.parameters()))
    return [loss.detach(), *(g.clone() for g in gradients if g is not None)]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("one", [False, True], ids=["three products", "one product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_is_the_same_to_the_bit(
    lowering: str, one: bool, dtype: torch.dtype
) -> None:
    results = []
    for on in (True, False):
        torch._dynamo.reset()
        model, x = made(one=one, dtype=dtype)
        run = torch.compile(model, backend="memopt", options=options(lowering, on=on))
        step(run, model, x)
        results.append(step(run, model, x))
        (graph,) = memopt.explain(model, x, options=options(lowering, on=on)).graphs
        assert graph.rewrites["fuse_rotary"] == 4
        forward = 0 if one and lowering == "eager" else 2
        assert graph.rewrites.get(NAME, 0) == on * (forward + 2)
    for mine, plain in zip(*results, strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_packed_product_is_saved_once(lowering: str) -> None:
    """Queries and keys are saved where they were made, where the lowering lets layouts change."""
    saved = []
    for on in (True, False):
        torch._dynamo.reset()
        model, x = made(one=True)
        run = torch.compile(model, backend="memopt", options=options(lowering, on=on))
        step(run, model, x)
        with Meter("cpu") as meter:
            loss = run(x)
        saved.append(meter.end_bytes)
        loss.backward()
    own = 2 * 2 * x.nbytes
    assert saved[1] - saved[0] == (own if lowering == "inductor" else 0)
