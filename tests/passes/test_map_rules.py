"""What is between convolutions is computed by rows with them: products, norms, attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bench.zoo.speech import chunk_encoder
from memopt.graph import aten
from tests.passes.map_graphs import cut, traced, whole_numbers

ROWS, PIECES = 64, 8
IMAGE = torch.empty(1, 3, ROWS, 12)
SOUND = torch.empty(1, 8, 2 * ROWS)
Form = Callable[[Tensor], Any]


class Between(nn.Module):
    """Two convolutions and what is between them."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.two(self.form(self.one(x)))


def linear(x: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = torch.arange(16.0).reshape(4, 4) % 5 - 2
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def pairs(x: Tensor) -> Tensor:
    return x.reshape(len(x), 2, 2, *x.shape[2:])


FORMS: dict[str, Form] = {
    "product": linear,
    "product and bias": lambda x: linear(x, torch.arange(4.0)),
    "products": lambda x: torch.bmm(x[0], torch.ones(4, 12, 12)).unsqueeze(0),
    "products and more": lambda x: torch.baddbmm(
        torch.ones(4, 1, 12), x.squeeze(0), torch.ones(4, 12, 12)
    ).unsqueeze(0),
    "unbind": lambda x: torch.cat([*reversed(pairs(x).unbind(2))], 1),
    "select": lambda x: torch.cat([pairs(x).select(1, 1), pairs(x).select(2, 1)], 1),
    "split": lambda x: torch.cat([*reversed(torch.split(x, [1, 3], 1))], 1),
    "slice": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "expand": lambda x: x[:, :1] + torch.cat([x[:, 1:2].expand(1, 2, ROWS, 12)] * 2, 1),
    "squeeze": lambda x: torch.squeeze(x.unsqueeze(2), 2) + torch.squeeze(x, 1),
    "names": lambda x: torch.select(input=torch.unsqueeze(x, dim=2), dim=2, index=0).relu(),
    "columns": lambda x: x[..., 1:-1:2],
}
ROUNDED: dict[str, Form] = {
    "norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    "norm of rows": lambda x: F.layer_norm(x.transpose(1, 2), (4, 12)).transpose(1, 2),
    "gate": lambda x: torch.cat([F.glu(x, 1), F.glu(-x, 1)], 1),
    "softmax": lambda x: torch.softmax(x, 3),
}


def largest(gm: fx.GraphModule) -> int:
    """Numbers of the largest value of a graph that is no input, and no map of a result."""
    maps = aten.empty_strided.default, aten.index_put_.default
    values = [
        n.meta["val"] for n in gm.graph.nodes if n.op == "call_function" and n.target not in maps
    ]
    return max(value.numel() for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("form", [*FORMS, *ROUNDED])
def test_a_stretch_is_cut_as_one(form: str) -> None:
    module, x = whole_numbers(Between({**FORMS, **ROUNDED}[form]), IMAGE)
    gm, run = traced(module, x)
    expected, before = run(x), largest(gm)
    assert cut(gm, PIECES) == 1
    gm.graph.eliminate_dead_code()
    assert largest(gm) <= before // 2
    if form in FORMS:
        assert torch.equal(run(x), expected)
    else:
        torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)


def test_attention_in_steps_goes_by_rows_of_queries() -> None:
    def attention(x: Tensor) -> Tensor:
        shares = torch.softmax(x[0] @ x[0].transpose(1, 2), -1)
        return (shares @ x[0]).unsqueeze(0)

    module, x = whole_numbers(Between(attention), IMAGE)
    gm, run = traced(module, x)
    expected, before = run(x), largest(gm)
    assert before == 4 * ROWS * ROWS
    cut(gm, PIECES)
    gm.graph.eliminate_dead_code()
    assert largest(gm) <= before // 4
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: F.linear(x.flatten(2), torch.ones(ROWS * 12, ROWS * 12)).reshape(x.shape),
        lambda x: torch.bmm(torch.ones(4, ROWS, ROWS), x[0]).unsqueeze(0),
        lambda x: torch.bmm(x[0], x[0].transpose(1, 2))[:, :, :12].unsqueeze(0),
        lambda x: x.unbind(2)[0].unsqueeze(2).expand(1, 4, ROWS, 12),
        lambda x: x[:, :, ::2],
        lambda x: F.glu(x, 2),
        lambda x: F.layer_norm(x, (ROWS, 12)),
        lambda x: torch.addmm(x[0, 0], x[0, 1], torch.ones(12, 12)).expand(1, 4, ROWS, 12),
    ],
    ids="all second itself unbind slice gate norm addend".split(),
)
def test_what_needs_other_rows_has_them(form: Form) -> None:
    module, x = whole_numbers(Between(form), IMAGE)
    gm, run = traced(module, x)
    expected = run(x)
    cut(gm, PIECES)
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)


class Attending(nn.Module):
    """Attention between convolutions of sound."""

    def __init__(self, mask: Callable[[], Tensor] | None, is_causal: bool = False) -> None:
        super().__init__()
        self.enter = nn.Conv1d(8, 24, 3, 2, padding=1)
        self.leave = nn.Conv1d(8, 8, 3, padding=1)
        self.mask, self.is_causal = mask, is_causal

    def forward(self, x: Tensor) -> Any:
        dense = self.enter(x).transpose(1, 2).contiguous()
        triple = dense.reshape(len(x), ROWS, 3, 2, 4)
        q, k, v = triple.permute(2, 0, 3, 1, 4)
        mask = self.mask() if self.mask else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.is_causal)
        return self.leave(y.transpose(1, 2).flatten(2).transpose(1, 2))


def apart() -> Tensor:
    at = torch.arange(ROWS)
    return at[:, None] - at


MASKS: dict[str, tuple[Callable[[], Tensor] | None, bool]] = {
    "band": (lambda: apart().abs() < 4, True),
    "chunks": (
        lambda: apart()[::8, ::8].repeat_interleave(8, 0).repeat_interleave(8, 1) == 0,
        True,
    ),
    "biases": (lambda: torch.where(apart().abs() < 4, apart() * 0.1, -torch.inf), True),
    "of heads": (lambda: (apart().abs() < 4).expand(1, 2, ROWS, ROWS), True),
    "a head each": (
        lambda: torch.stack([apart().abs() < 4, apart().abs() < 8])[None],
        False,
    ),
    "causal": (lambda: apart() >= 0, False),
    "a wide band": (lambda: apart().abs() < 24, False),
    "nothing to see": (lambda: (apart().abs() < 4) & (apart() + torch.arange(ROWS) != 9), False),
    "none": (None, False),
}


def whole_keys(gm: fx.GraphModule) -> bool:
    """Whether an attention reads every key."""
    target = aten._scaled_dot_product_flash_attention_for_cpu.default
    calls = gm.graph.find_nodes(op="call_function", target=target)
    lengths = {(c.args[0].meta["val"].shape[2], c.args[1].meta["val"].shape[2]) for c in calls}
    assert all(queries <= ROWS // 2 for queries, _ in lengths)
    assert lengths
    return any(keys == ROWS for _, keys in lengths)


@pytest.mark.parametrize("name", MASKS)
def test_attention_goes_by_rows(name: str) -> None:
    mask, is_narrow = MASKS[name]
    torch.manual_seed(0)
    module, x = Attending(mask).eval(), torch.randn(SOUND.shape)
    gm, run = traced(module, x)
    expected = run(x)
    assert cut(gm, PIECES)
    assert whole_keys(gm) != is_narrow
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


class Tabled(Attending):
    """A mask, and numbers of rows, that are no constants."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(lambda: self.table)
        shown = apart().abs() < 4
        table = shown if dtype == torch.bool else torch.where(shown, 0.0, -torch.inf)
        self.table = nn.Buffer(table)
        self.order = nn.Buffer(torch.arange(2 * ROWS).flip(0))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x[:, :, self.order])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_tables_that_are_inputs_are_no_constants(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = Tabled(dtype).eval(), torch.randn(SOUND.shape)
    gm, run = traced(module, x)
    expected = run(x)
    cut(gm, PIECES)
    assert whole_keys(gm)
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6)


def test_rows_by_number_of_an_input_have_the_whole_map() -> None:
    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv1d(8, 8, 3, padding=1)
            self.order = nn.Buffer(torch.arange(2 * ROWS) // 2)

        def forward(self, x: Tensor) -> Any:
            return self.one(self.one(x)[:, :, self.order])

    module, x = whole_numbers(Gathered(), SOUND)
    gm, run = traced(module, x)
    expected = run(x)
    cut(gm, PIECES)
    assert torch.equal(run(x), expected)


def test_keys_that_are_whole_are_dense_once() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Any:
            q, k, v = torch.split(self.enter(x), 2, 1)
            return self.leave(F.scaled_dot_product_attention(q, F.relu(k), v * 2))

    torch.manual_seed(0)
    module, x = Heads().eval(), torch.randn(1, 3, ROWS, 8)
    gm, run = traced(module, x)
    expected = run(x)
    cut(gm, PIECES)
    clones = gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert all(clone.meta["val"].shape[2] < ROWS for clone in clones)
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6)


def test_a_number_that_is_none_is_not_hidden() -> None:
    mask = MASKS["chunks"][0]
    assert mask is not None
    torch.manual_seed(0)
    module = Attending(lambda: torch.where(mask(), 0.0, torch.nan)).eval()
    gm, run = traced(module, x := torch.randn(SOUND.shape))
    expected = run(x)
    cut(gm, PIECES)
    assert run(x).isnan().equal(expected.isnan())


@pytest.mark.parametrize("pieces", [2, 4, 8, 16])
def test_blocks_of_a_mask_take_less_than_the_mask(pieces: int) -> None:
    recipe = chunk_encoder(10, 16, 2, 4, positions=512)
    gm, _ = traced(recipe.build().eval(), recipe.inputs(1)["sound"])
    cut(gm, pieces)
    gm.graph.eliminate_dead_code()
    constants = sum(buffer.nbytes for buffer in gm.buffers())
    assert constants <= 512 * 512 * 4 // 4
    has_mask = largest(gm) >= 512 * 512
    assert has_mask == (pieces < 8)


def test_attention_that_needs_all_is_left_whole() -> None:
    torch.manual_seed(0)
    module, x = Attending(None, is_causal=True).eval(), torch.randn(SOUND.shape)
    gm, run = traced(module, x)
    expected = run(x)
    cut(gm, PIECES)
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6)


def test_attention_of_a_batch_goes_by_its_entries() -> None:
    torch.manual_seed(0)
    module, x = Attending(lambda: apart() >= 0).eval(), torch.randn(ROWS, 8, 2 * ROWS)
    gm, run = traced(module, x)
    expected = run(x)
    assert cut(gm, PIECES) == 1
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pieces", [2, 4, 32])
def test_an_encoder_of_chunks_runs_as_a_stream(pieces: int) -> None:
    positions, width = 1024, 16
    recipe = chunk_encoder(10, width, 2, 2, positions=positions)
    torch.manual_seed(0)
    module, x = recipe.build().eval(), recipe.inputs(1)["sound"]
    exact = module.double()(x.double()).detach()
    gm, run = traced(module.float(), x)
    whole = run(x)
    assert cut(gm, pieces) == 1  # no value is there whole
    gm.graph.eliminate_dead_code()
    if pieces == 32:
        assert largest(gm) < positions * width // 2
    assert (run(x) - exact).abs().max() <= 2 * (whole - exact).abs().max()
