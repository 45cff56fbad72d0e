"""Small Triton kernels, right and wrong, for the tests of the bench itself."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def total(x):
    return tl.sum(x, axis=0)


@triton.jit
def scale_and_shift(x_ptr, y_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
    """``x * y + factor``, every operation in the dtype of ``x``."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    x = tl.load(x_ptr + columns, mask=inside)
    y = tl.load(y_ptr + columns, mask=inside)
    shifted = x * y + factor.to(tl.float32).to(x.dtype)
    tl.store(out_ptr + columns, shifted, mask=inside)


@triton.jit
def sum_and_tanh(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, mask=columns < n, other=0.0)
    tl.store(out_ptr, total(x))
    tl.store(out_ptr + 1, libdevice.tanh(tl.max(x, axis=0).to(tl.float32)))


@triton.jit
def product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, SIZE)
    offsets = rows[:, None] * SIZE + rows[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(out_ptr + offsets, tl.dot(a, b, input_precision=PRECISION))


@triton.autotune(configs=[triton.Config({"STEP": 1}), triton.Config({"STEP": 2})], key=["n"])
@triton.jit
def tuned(out_ptr, n, STEP: tl.constexpr):
    tl.store(out_ptr, n + STEP)


@triton.jit
def add(x_ptr, out_ptr, n, ADDED: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr) + n + ADDED)


@triton.jit
def copy(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    """Copies ``n`` elements; with a shift, from and to places beside its own."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    x = tl.load(x_ptr + columns + shift, mask=inside)
    tl.store(out_ptr + columns, x, mask=inside)


@triton.jit
def write_then_read(x_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(x_ptr + columns, columns.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    x = tl.load(x_ptr + (BLOCK - 1 - columns))
    tl.store(x_ptr + BLOCK + columns, x)


@triton.jit
def one_element(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK) * 0, 1.0)


@triton.jit
def many_values(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """More live values than one warp has registers."""
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns)
    mean = tl.sum(x, axis=0) / BLOCK
    spread = tl.sqrt(tl.sum((x - mean) * (x - mean), axis=0))
    tl.store(out_ptr + columns, (x - mean) / spread)


@triton.jit
def masked(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Stores what its masked lanes hold."""
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + columns, mask=columns < n))


@triton.jit
def last_program(out_ptr):
    """Leaves the number of whichever program comes last."""
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def random_words(seed_ptr, counter_ptr, out_ptr, BLOCK: tl.constexpr):
    """Triton's four words for each counter, one after another."""
    rows = tl.arange(0, BLOCK)
    words = tl.randint4x(tl.load(seed_ptr), tl.load(counter_ptr + rows))
    for number in tl.static_range(4):
        tl.store(out_ptr + rows * 4 + number, words[number].to(tl.int64))
