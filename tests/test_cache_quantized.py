"""Keys and values in a few bits come back within half a step, and the newest as they are."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt import cache as caches
from memopt.cache import HeadLayer, QuantizedCache, QuantizedStore
from memopt.cache.codes import decode, encode
from memopt.errors import ConfigError
from tests.cache_models import by_transformers, generated, prompts, tiny
from tests.cache_steps import Tokens, causal_mask, dense, fed
from tests.references import assert_equal_in_float64

GROUP, SINKS, LENGTH = 4, 2, 40
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(
    bits=st.sampled_from([8, 4]),
    dim=st.sampled_from([0, 1]),
    dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, -7.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_a_number_comes_back_within_half_a_step(
    bits: int, dim: int, dtype: torch.dtype, size: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(16, 8, generator=generator, dtype=torch.float64) * size + offset).to(dtype)
    codes, step, zero = encode(x, dim, bits)
    back = decode(codes, step, zero, bits)
    assert codes.numel() == x.numel() * bits // 8
    assert (step.dtype, zero.dtype, back.dtype) == (dtype, dtype, dtype)
    ulp = torch.finfo(dtype).eps / 2 * torch.maximum(back.double().abs(), x.double().abs())
    arithmetic = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * x.double().abs()
    allowed = step.double() / 2 + ulp + arithmetic.amax()
    assert ((back.double() - x.double()).abs() <= allowed).all()


def test_the_smallest_of_a_group_and_equal_numbers_come_back_as_they_were() -> None:
    x = torch.randn(8, 6)
    x[:, 2] = 1.7
    back = decode(*encode(x, 0, 4), 4)
    assert torch.equal(back.amin(0), x.amin(0))
    assert torch.equal(back[:, 2], x[:, 2])


def test_a_large_channel_does_not_coarsen_the_others() -> None:
    """Why keys have a step for each channel."""
    x = torch.randn(128, 64)
    x[:, 5] *= 100

    def error(dim: int) -> float:
        others = [c for c in range(64) if c != 5]
        return float((decode(*encode(x, dim, 4), 4) - x)[:, others].norm())

    assert error(0) < error(1) / 5


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """`(B, H, M, R, D)`."""
    return x.reshape(*x.shape[:2], -1, GROUP, x.shape[3])


def coded(x: torch.Tensor) -> torch.Tensor:
    """What blocks are made of: the first block's last token is there for the sinks."""
    return torch.cat([x[:, :, GROUP - 1 : GROUP].expand(-1, -1, SINKS, -1), x[:, :, SINKS:]], 2)


def stale(x: torch.Tensor, dim: int, bits: int, last: int) -> torch.Tensor:
    """What the column ``last`` sees: codes but for the first tokens and the newest blocks."""
    blocks = in_blocks(coded(x))
    seen = decode(*encode(blocks, dim, bits), bits).flatten(2, 3)
    newest = max(0, last + 1 - 2 * GROUP)
    seen[:, :, newest:] = x[:, :, newest:]
    seen[:, :, :SINKS] = x[:, :, :SINKS]
    return seen


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    bits=st.sampled_from([8, 4]),
)
def test_a_token_sees_codes_of_old_blocks_and_the_rest_as_it_is(
    sizes: list[int], bits: int
) -> None:
    """Written out block by block, for the tokens that come one by one behind some prompts."""
    n = 36
    sizes = [size for at, size in enumerate(sizes) if sum(sizes[: at + 1]) < n]
    single = n - sum(sizes)
    tokens = Tokens.drawn(n, 2, 2)
    store = QuantizedStore(LENGTH, bits, GROUP, SINKS)
    got = fed(HeadLayer([([0, 1], store)], LENGTH), tokens, [*sizes, *[1] * single])
    for last in range(n - single, n):
        held = Tokens(
            tokens.q, stale(tokens.k, 3, bits, last), stale(tokens.v, 4, bits, last), tokens.real
        )
        expected = dense(held, causal_mask(tokens))
        assert_equal_in_float64([got[:, :, last]], [expected[:, :, last]])


def test_each_sequence_has_sinks_of_its_own() -> None:
    tokens = Tokens.drawn(30, 2, padding=(9, 0))
    store = QuantizedStore(LENGTH, 4, GROUP, SINKS)
    fed(HeadLayer([([0, 1], store)], LENGTH), tokens, [20, 10])
    assert store.sink_columns.tolist() == [[9, 10], [0, 1]]
    assert torch.equal(store.keys.sinks[0], tokens.k[0, :, 9:11])
    assert torch.equal(store.values.sinks[1], tokens.v[1, :, :2])


@pytest.mark.parametrize("sizes", [[32], [1] * 32, [3, 1, 9, *[1] * 19]])
def test_strange_keys_of_sinks_and_padding_do_not_harm_their_block(sizes: list[int]) -> None:
    """Other tokens have the codes that they have where no key is strange."""

    def codes(size: float) -> torch.Tensor:
        torch.manual_seed(0)
        tokens = Tokens.drawn(32, 2, padding=(0, 3))
        tokens.k[:, :, :SINKS] *= size
        tokens.k[1, :, : 3 + SINKS] *= size
        store = QuantizedStore(LENGTH, 4, GROUP, SINKS)
        fed(HeadLayer([([0, 1], store)], LENGTH), tokens, sizes)
        return torch.cat([store.keys.codes[0, :, 0, SINKS:], store.keys.codes[1, :, 1, 1:]], 1)

    assert torch.equal(codes(50.0), codes(1.0))


def test_the_error_that_is_told_is_that_of_the_codes() -> None:
    """However they came to be, and each block once."""
    tokens = Tokens.drawn(33, 2, dtype=torch.float32)
    stop = (33 - 1) // GROUP * GROUP
    for sizes in ([33], [1] * 33, [5, 1, 1, 20, 6]):
        store = QuantizedStore(LENGTH, 4, GROUP, SINKS)
        layer = HeadLayer([([0, 1], store)], LENGTH)
        fed(layer, tokens, sizes)
        (told,) = QuantizedCache.errors(caches.HeadCache([layer]))
        for x, dim, error in ((tokens.k, 3, told.keys), (tokens.v, 4, told.values)):
            blocks = in_blocks(coded(x)[:, :, :stop]).double()
            back = decode(*encode(blocks.float(), dim, 4), 4).double()
            assert math.isclose(
                error, ((back - blocks).norm() / blocks.norm()).item(), rel_tol=1e-4
            )


def test_half_the_bits_are_a_larger_error_and_none_is_told_before_there_are_codes() -> None:
    model = caches.prepare(tiny())
    told = {}
    for bits in (8, 4):
        cache = QuantizedCache(model.config, 64, bits=bits, group=GROUP)
        assert cache.errors() == [(0.0, 0.0)] * 2
        generated(model, prompts(), cache=cache)
        told[bits] = cache.errors()
    for eight, four in zip(told[8], told[4], strict=True):
        assert 0 < eight.keys < four.keys < 0.2
        assert 0 < eight.values < four.values < 0.2


def test_what_fits_in_the_newest_blocks_is_exact() -> None:
    model, inputs = tiny(), prompts()
    expected = by_transformers(model, inputs)
    cache = QuantizedCache(model.config, 64, group=16)
    assert torch.equal(generated(model, inputs, cache=cache), expected)


def test_only_one_head_is_whole_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = QuantizedStore.read

    def noted(self: QuantizedStore, *args: Any) -> Any:
        k, v = plain(self, *args)
        seen.append(k.shape[1])
        return k, v

    monkeypatch.setattr(QuantizedStore, "read", noted)
    store = QuantizedStore(LENGTH, 4, GROUP, SINKS)
    fed(HeadLayer([(range(4), store)], LENGTH), Tokens.drawn(20, 4), [19, 1])
    assert seen == [1] * 4


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"bits": 3}, "bits=3: allowed is 8 or 4"),
        ({"group": 0}, "group=0"),
        ({"sinks": -1}, "sinks=-1"),
    ],
)
def test_other_bits_groups_and_sinks_are_refused(named: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        QuantizedCache(tiny().config, 64, **named)


def test_an_odd_width_in_four_bits_is_refused() -> None:
    store = QuantizedStore(LENGTH)
    with pytest.raises(ConfigError, match=r"heads of 7 entries.*use bits=8"):
        fed(HeadLayer([([0, 1], store)], LENGTH), Tokens.drawn(3, 2, width=7), [3])
