"""Which way a region runs, with a timer that says what it is told."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from memopt.device import DEVICES
from memopt.rows.choice import choose, inductor_kernels, may_be_faster
from memopt.rows.lowering import LoweredRows, lower_rows
from memopt.rows.select import choose_regions
from memopt.rows.tiling import Tiling
from tests.row_functions import (
    add_norm_quantise,
    calls,
    dropout,
    dropout_backward,
    lowered,
    quantise_groups,
    swiglu_backward,
    traced,
    traced_for_any_rows,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compile cache of the test's own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "memopt"


class Timer:
    """Takes so many seconds for each tiling, and so many for what holds no call."""

    def __init__(self, tilings: Sequence[float], inductor: float) -> None:
        self.tilings, self.inductor = tilings, inductor
        self.asked: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def __call__(
        self, graph: fx.GraphModule, inputs: Sequence[Tensor], device: torch.device
    ) -> float:
        assert device == CPU
        self.asked.append((graph, list(inputs)))
        for call in calls(graph):
            assert isinstance(call.args[4], int)
            return self.tilings[call.args[4]]
        return self.inductor


def norm(rows: int = 6, width: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x = torch.randn(2, rows, width).to(dtype)
    return x, x + 1, torch.randn(width).to(dtype)


@pytest.mark.parametrize(
    ("tilings", "inductor", "taken"),
    [
        ([2e-5, 1e-5, 3e-5], 4e-5, 1),
        ([1e-5, 2e-5, 3e-5], 4e-5, 0),
        ([2e-5, 3e-5, 4e-5], 1e-5, None),
        ([1e-5, 2e-5, 2e-5], 1e-5, None),
    ],
)
def test_what_is_fastest_is_taken_and_inductor_where_nothing_is_faster(
    tilings: list[float], inductor: float, taken: int | None
) -> None:
    region = lowered(add_norm_quantise, norm())
    assert len(region.tilings) == 3
    choice = choose(region, Timer(tilings, inductor))
    assert choice.region == (None if taken is None else replace(region, tiling=taken))
    for seconds in (min(tilings), inductor):
        assert f"{1e6 * seconds:.1f}" in choice.why


def test_the_tiling_is_an_argument_of_the_call() -> None:
    choice = choose(lowered(add_norm_quantise, norm()), Timer([2, 1, 3], 4))
    assert choice.region is not None
    (call,) = calls(choice.region.as_call())
    assert call.args[4] == 1
    assert call.args[2:4] == (choice.region.plain, choice.region.kernel)


def test_every_way_is_timed_on_what_the_graph_would_read() -> None:
    """The same numbers for all, in the traced strides; and they give the same results."""
    x = torch.randn(3, 5, 2 * 64).bfloat16()[..., 64:]
    region = lowered(quantise_groups, (x,))
    timer = Timer([1, 1, 1], 1)
    choose(region, timer)
    assert len(timer.asked) == 1 + len(region.tilings)
    expected = None
    for graph, (drawn,) in timer.asked:
        assert (drawn.shape, drawn.stride(), drawn.dtype) == (x.shape, x.stride(), x.dtype)
        results = graph(drawn)
        expected = expected or results
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)


def test_a_region_is_timed_once_whatever_layer_it_is_in() -> None:
    """Nor have its texts anything of the layer in them: each is compiled once."""

    def layers(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for _ in range(3):
            total, *found = add_norm_quantise(x, y, weight)
            results += [total, *found]
            x, y = torch.cumsum(total, 0), torch.cumsum(found[0], 0)
        return tuple(results)

    regions = choose_regions(traced(layers, norm()).graph)
    one, *others = (lower_rows(region, DEVICES["h100"]) for region in regions)
    assert len(others) == 2
    timer = Timer([2, 1, 3], 4)
    for region in (one, *others):
        assert choose(region, timer).region == replace(region, tiling=1)
        assert (region.plain, region.kernel) == (one.plain, one.kernel)
    assert len(timer.asked) == 4
    again = Timer([0, 0, 0], 0)
    choose(one, again)
    assert again.asked == []


def test_another_size_dtype_or_tiling_is_another_question() -> None:
    timer = Timer([1, 2, 3, 4], 5)

    def asks(region: LoweredRows) -> bool:
        before = len(timer.asked)
        choose(region, timer)
        return len(timer.asked) > before

    first = lowered(add_norm_quantise, norm(6))  # twelve rows
    assert asks(first)
    assert not asks(lowered(add_norm_quantise, norm(8)))
    assert asks(lowered(add_norm_quantise, norm(9)))
    assert asks(lowered(add_norm_quantise, norm(4)))
    assert asks(lowered(add_norm_quantise, norm(6, 128)))
    assert asks(lowered(add_norm_quantise, norm(6, dtype=torch.bfloat16)))
    more = (*first.tilings, Tiling(rows=1, block=64, threads=64))
    assert asks(replace(first, tilings=more))
    assert asks(replace(first, tilings=more[1:]))


def test_rows_that_vary_are_timed_as_many_as_tracing_saw() -> None:
    timer = Timer([1, 1, 1], 1)
    inputs = norm(7)
    choose(lowered(add_norm_quantise, inputs, traced_for_any_rows), timer)
    for graph, drawn in timer.asked:
        assert {t.shape for t in drawn} == {t.shape for t in inputs}
        assert len(graph.graph.find_nodes(op="placeholder")) == len(inputs)
        assert {r.shape[:2] for r in graph(*drawn)} == {inputs[0].shape[:2]}


def without_memory(graph: fx.GraphModule, inputs: Sequence[Tensor], device: torch.device) -> float:
    raise torch.OutOfMemoryError("CUDA out of memory")


def norm_in_groups(x: Tensor) -> tuple[Tensor, ...]:
    return quantise_groups(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_without_memory_to_find_out_bytes_decide_and_nothing_is_kept(cache: Path) -> None:
    """Inductor hands rows that are normalised to another kernel for groups, but not for rows."""
    groups = lowered(norm_in_groups, norm()[:1])
    choice = choose(groups, without_memory)
    assert choice.region == groups
    assert "Inductor needs 2" in choice.why
    choice = choose(lowered(add_norm_quantise, norm()), without_memory)
    assert choice.region is None
    assert "Inductor needs 1" in choice.why
    assert not cache.exists()


def test_timing_leaves_the_generator_alone() -> None:
    region = lowered(quantise_groups, norm()[:1])
    before = torch.get_rng_state()
    choose(region, Timer([1, 1, 1], 1))
    assert torch.equal(torch.get_rng_state(), before)


def normalise(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    total = x + y
    centred = total - total.mean(-1, keepdim=True)
    return total, centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_regions_with_groups_or_several_sums_and_int8_are_worth_asking_about() -> None:
    x, y, weight = norm()
    packed = torch.zeros(2, 6, 8, dtype=torch.uint8)
    seeds = torch.tensor([1, 2])
    asked = {
        f.__name__: (may_be_faster(program), inductor_kernels(program))
        for f, inputs in (
            (add_norm_quantise, (x, y, weight)),
            (norm_in_groups, (x,)),
            (dropout, (x, seeds)),
            (swiglu_backward, (x, y, x)),
            (dropout_backward, (x, packed)),
            (normalise, (x, y)),
        )
        for program in [lowered(f, inputs).program]
    }
    assert asked == {
        "add_norm_quantise": (True, 1),
        "norm_in_groups": (True, 2),
        "dropout": (True, 1),
        "swiglu_backward": (False, 1),
        "dropout_backward": (False, 1),
        "normalise": (False, 1),
    }
