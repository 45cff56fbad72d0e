"""The launches of banded attention, beside what the gate tries: splits, tables, far rows."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS, compile_for
from bench.triton.gate import for_target, uninitialised_is_nan
from bench.triton.interpreter import install
from bench.triton.trace import trace
from memopt.kernels import banded_launches
from memopt.kernels.banded_attention import BANDED_ATTENTION, BANDED_ATTENTION_BACKWARD
from tests.references import assert_within_reference_error, banded_attention
from tests.scratch import scratch_of

Tensor = torch.Tensor
install()
plain, plain_backward = BANDED_ATTENTION.plain, BANDED_ATTENTION_BACKWARD.plain


def decoding(queries: int = 1, device: str = "cpu") -> tuple[Any, ...]:
    """A few new queries of two sequences, whose two heads of keys have a rule each."""
    q = torch.randn(2, 6, queries, 64, device=device)
    k, v = torch.randn(2, 2, 2, 700, 64, device=device)
    return q, k, v, [300, 0], [70, 0], 0.125


def assert_as_exact_as_plain(results: Any, arguments: tuple[Any, ...]) -> None:
    q, k, v, *table = (t.cpu() if isinstance(t, Tensor) else t for t in arguments)
    exact = banded_attention(q.double(), k.double(), v.double(), *table)
    # A few numbers: each sum of partial ones has a rounding of its own.
    results = [t.cpu() for t in results]
    assert_within_reference_error(results, exact, plain(q, k, v, *table), times=1.5)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_split_keys_give_what_whole_ones_do(splits: int, queries: int) -> None:
    arguments = decoding(queries)
    with uninitialised_is_nan(), trace() as launches:
        results = banded_launches.forward(*arguments, splits=splits)
    assert len(launches) == 1 + (splits > 1)
    assert not [conflict for launch in launches for conflict in launch.conflicts]
    assert_as_exact_as_plain(results, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 5, None])
def test_on_a_device_split_keys_give_what_whole_ones_do(splits: int | None) -> None:
    arguments = decoding(1, "cuda")
    assert_as_exact_as_plain(banded_launches.forward(*arguments, splits=splits), arguments)


def test_keys_are_split_where_processors_would_be_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded_launches, "processors", lambda x: 132)
    q, k, v, *table = decoding()
    splits = banded_launches.split_count(q, k, v)
    assert splits == -(-700 // (32 * 4))  # four tiles of keys for each
    assert splits * 2 * 2 <= 132  # sequences, heads of keys
    assert banded_launches.split_count(q.expand(40, 6, 1, 64), k.expand(2, 2, 700, 64), v) >= 1
    measured = scratch_of(lambda: banded_launches.forward(q, k, v, *table))
    assert measured <= banded_launches.forward_bytes(q, k, v) + 4096


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_table_is_that_of_plain(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    heads, keys, group = number(1, 3), number(1, 90), number(1, 3)
    q = torch.randn(1, heads * group, number(1, keys), 16)
    k, v = torch.randn(2, 1, heads, keys, 16)
    spans, sinks = ([number(0, keys + 2) for _ in range(heads)] for _ in range(2))
    arguments = q, k, v, spans, sinks, 0.25
    out, lse = plain(*arguments)
    torch.testing.assert_close(banded_launches.forward(*arguments), (out, lse))
    backward = torch.randn_like(out), q, k, v, out, lse, spans, sinks, 0.25
    found = banded_launches.backward(*backward)
    torch.testing.assert_close(found, plain_backward(*backward))


@pytest.mark.parametrize("target", TARGETS)
def test_split_launches_compile_well(target: Any) -> None:
    arguments = tuple(t.bfloat16() if isinstance(t, Tensor) else t for t in decoding())
    with trace() as launches:
        banded_launches.forward(*arguments, splits=4)
    for launch in launches:
        report = compile_for(launch.kernel, for_target(target, launch.arguments), target)
        assert report.problems() == []


def test_offsets_beyond_two_to_the_31st_reach_their_rows() -> None:
    stride = 2**31 + 16  # of virtual memory; only a few pages are touched
    q, near = torch.randn(1, 1, 2, 16).half(), torch.randn(1, 1, 2, 16).half()
    far = torch.empty(stride + 16, dtype=torch.float16).as_strided(
        (1, 1, 2, 16), (0, 0, stride, 1)
    )
    far.copy_(near)
    table = [0], [0], 0.25
    results = banded_launches.forward(q, far, far, *table)
    assert all(
        torch.equal(a, b)
        for a, b in zip(results, banded_launches.forward(q, near, near, *table), strict=True)
    )
