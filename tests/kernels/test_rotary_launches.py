"""The rotary kernel's launches: in place, odd sizes, far rows, and bytes beside liger's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS
from bench.triton.gate import check_spec, compile_spec, uninitialised_is_nan
from bench.triton.interpreter import install
from bench.triton.trace import Launch, trace
from memopt.kernels import triton_rotary
from memopt.kernels.rotary import SPEC
from memopt.kernels.spec import Arguments, Results
from tests.kernels.rotary_cases import by_halves, heads, tables
from tests.references import assert_within_reference_error

install()


def in_place(q: Tensor, k: Tensor, *options: Any) -> Results:
    """Of copies, which keep the strides."""
    q, k = q.clone(), k.clone()
    return triton_rotary.rotate(q, k, *options, results=(q, k))


IN_PLACE = replace(SPEC, name="memopt::rotary_", launch=in_place)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_in_place_passes_the_gate_and_gives_the_same_bits(dtype: torch.dtype) -> None:
    for number, sample in enumerate(SPEC.samples(dtype)):
        assert check_spec(IN_PLACE, sample) == [], f"sample {number}"
        for mine, apart in zip(in_place(*sample), SPEC.launch(*sample), strict=True):
            assert torch.equal(mine, apart), f"sample {number}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rare_forms_compile_well_too(dtype: torch.dtype) -> None:
    samples = [*SPEC.samples(dtype)]
    for sample in samples[3:]:
        assert compile_spec(SPEC, sample, TARGETS) == []
    assert compile_spec(IN_PLACE, samples[2], TARGETS) == []  # a part of each head


def moved(run: Callable[[], object]) -> tuple[int, list[Launch]]:
    """Bytes to and from memory of what is launched, and the launches."""
    with trace() as launches:
        run()
    return sum(launch.dram_bytes for launch in launches), launches


def assert_right(sample: Arguments) -> None:
    """No further from float64 than the reference, with nothing left unwritten, also in place."""
    q, k, cos, sin, *options = sample
    exact = SPEC.plain(*(t.double() for t in (q, k, cos, sin)), *options)
    with uninitialised_is_nan():
        results = SPEC.launch(*sample)
    assert_within_reference_error(results, exact, SPEC.plain(*sample))
    for mine, apart in zip(in_place(*sample), results, strict=True):
        assert torch.equal(mine, apart)


@pytest.mark.parametrize(
    ("size", "rotary_dim", "counts"),
    [
        (2, 2, (1, 1)),
        (10, 6, (7, 3)),
        (34, 34, (12, 0)),
        (80, 80, (8, 8)),
        (96, 96, (3, 1)),
        (128, 80, (0, 5)),
        (256, 64, (6, 2)),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_sizes_that_fit_no_block_will_do(
    size: int, rotary_dim: int, counts: tuple[int, int], interleaved: bool, whole: bool
) -> None:
    q, k = (heads(2, count, 11, size, torch.bfloat16) for count in counts)
    width = rotary_dim if whole else rotary_dim // 2
    turned = tables(2 if whole else 1, 11, width, torch.float32)
    assert_right((q, k, *turned, rotary_dim, interleaved, False))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (3, 1)])
def test_no_positions_and_one_are_sizes_too(shape: tuple[int, int]) -> None:
    q = heads(shape[0], 4, shape[1], 16, torch.float32)
    assert_right((q, q.clone(), *tables(1, shape[1], 8, torch.float32), 16, False, False))


def test_a_pair_of_80_entries_shares_a_sector_which_is_moved_once() -> None:
    q, k = heads(2, 8, 32, 80, torch.bfloat16), heads(2, 8, 32, 80, torch.bfloat16)
    turned = tables(1, 32, 40, torch.bfloat16)
    results = SPEC.plain(q, k, *turned, 80, False, False)
    dram_bytes, launches = moved(lambda: SPEC.launch(q, k, *turned, 80, False, False))
    assert dram_bytes == sum(t.nbytes for t in (q, k, *turned, *results))
    # A half is two and a half sectors: what asks for a half by itself asks for three.
    assert launches[0].coalescing >= 2.5 / 3
    assert launches[0].conflicts == []


@pytest.mark.parametrize("rotary_dim", [32, 128])
def test_in_place_moves_no_more_than_what_is_rotated(rotary_dim: int) -> None:
    q, k = heads(1, 8, 32, 128, torch.bfloat16), heads(1, 2, 32, 128, torch.bfloat16)
    turned = tables(1, 32, rotary_dim // 2, torch.bfloat16)
    dram_bytes, _ = moved(lambda: in_place(q, k, *turned, rotary_dim, False, False))
    rotated = (q.nbytes + k.nbytes) * rotary_dim // 128
    assert dram_bytes == 2 * rotated + sum(t.nbytes for t in turned)


def test_queries_and_keys_that_lie_in_one_tensor_are_rotated_where_they_are() -> None:
    packed = heads(2, 12, 32, 64, torch.bfloat16)
    q, k, values = packed.split_with_sizes([8, 2, 2], 1)
    before, turned = values.clone(), tables(1, 32, 32, torch.bfloat16)
    options = *turned, 64, False, False
    expected = SPEC.launch(q, k, *options)
    dram_bytes, launches = moved(lambda: triton_rotary.rotate(q, k, *options, results=(q, k)))
    assert launches[0].conflicts == []
    assert dram_bytes == 2 * (q.nbytes + k.nbytes) + sum(t.nbytes for t in turned)
    assert torch.equal(packed, torch.cat([*expected, before], 1))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:1, :, :, :1].expand(2, -1, -1, 32),
        lambda t: t[..., ::2],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)[..., :32],
    ],
    ids=["expanded", "apart", "columns"],
)
def test_entries_that_do_not_lie_side_by_side_are_copied_first(
    view: Callable[[Tensor], Tensor],
) -> None:
    q = view(heads(2, 4, 9, 64, torch.float32))
    cos, sin = (view(t[None])[0] for t in tables(2, 9, 64, torch.float32))
    q, cos, sin = q, cos[..., :16], sin[..., :16]
    given = q, q, cos, sin, 32, False, False
    expected = SPEC.plain(*(t.contiguous() for t in given[:4]), *given[4:])
    for mine, plain in zip(SPEC.launch(*given), expected, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("far", ["batch", "head", "position"])
def test_offsets_beyond_two_to_the_31st_reach_their_rows(far: str) -> None:
    stride = 2**29 + 16  # of virtual memory; only a few pages are touched
    strides = {"batch": 256, "head": 64, "position": 16, far: stride}
    shape = tuple(5 if name == far else n for name, n in zip(strides, (2, 4, 4), strict=True))
    whole = torch.empty(4 * stride + 2048, dtype=torch.bfloat16)
    q = whole.as_strided((*shape, 16), (*strides.values(), 1))
    q.copy_(torch.randn(q.shape))
    options = *tables(1, shape[2], 8, torch.float32), 16, False, False
    expected = SPEC.launch(q.clone(), q.clone(), *options)
    for mine, near in zip(SPEC.launch(q, q.clone(), *options), expected, strict=True):
        assert torch.equal(mine, near)
    k = q.clone()
    triton_rotary.rotate(q, k, *options, results=(q, k))
    assert torch.equal(q, expected[0])


def test_two_runs_give_the_same_bits() -> None:
    for sample in SPEC.samples(torch.float32):
        pairs = zip(SPEC.launch(*sample), SPEC.launch(*sample), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "backward"])
def test_it_moves_no_more_bytes_than_liger(dtype: torch.dtype, batch: int, inverse: bool) -> None:
    rope = pytest.importorskip("liger_kernel.ops.rope")
    q, k = heads(2, 8, 32, 128, dtype), heads(2, 2, 32, 128, dtype)
    cos, sin = (by_halves(t) for t in tables(batch, 32, 64, dtype))
    halves = [t[..., :64] for t in (cos, sin)]
    mine, _ = moved(lambda: SPEC.launch(q, k, *halves, 128, False, inverse))
    run = rope.rope_backward if inverse else rope.rope_forward
    theirs, _ = moved(lambda: run(q.clone(), k.clone(), cos, sin))
    assert 0 < mine <= theirs


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "backward"])
def test_a_part_of_each_head_in_place_moves_no_more_bytes_than_liger(inverse: bool) -> None:
    rope = pytest.importorskip("liger_kernel.ops.rope")
    q, k = heads(2, 8, 32, 128, torch.bfloat16), heads(2, 2, 32, 128, torch.bfloat16)
    cos, sin = (by_halves(t) for t in tables(1, 32, 16, torch.bfloat16))
    halves = [t[..., :16] for t in (cos, sin)]
    mine, _ = moved(lambda: in_place(q, k, *halves, 32, False, inverse))
    run = rope.rope_backward if inverse else rope.rope_forward
    theirs, _ = moved(lambda: run(q.clone(), k.clone(), cos, sin))
    assert 0 < mine <= theirs
