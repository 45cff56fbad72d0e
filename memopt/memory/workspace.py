"""Scratch that a library kernel allocates and frees while it runs, in bytes.

Nothing in an operator's signature tells it: oneDNN packs weights and activations into its own
layouts, attention keeps tiles per thread, type promotion copies an operand. Attention has a
formula, read off the kernel's source; everything else is run once per signature on the device at
hand, on zeros, and the allocator is watched. Sizes are facts of the machine, as the kernels are.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from memopt._torch import OpOverload, disable_modes, pytree, size_hint
from memopt.kernels import scratch_table

log = logging.getLogger(__name__)

_MAX_PROBE_BYTES = 2**32


def workspace_bytes(op: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Scratch bytes of one call.

    Args:
        op: an operator overload; anything else has no scratch that is known.
        args: its positional arguments, fake tensors among them.
        kwargs: its keyword arguments.
        result: what it returns.
    """
    if not isinstance(op, OpOverload):
        return 0
    name = str(op.overloadpacket)
    if name in _FORMULAS:
        return _FORMULAS[name](args, result)
    if op.namespace == "memopt":
        formula = scratch_table().get(name)
        return formula(*args) if formula else 0
    if name in _NO_SCRATCH or _is_plain_loop(op, args) or op.namespace not in ("aten", "mkldnn"):
        return 0
    if op._schema.is_mutable or torch.Tag.dynamic_output_shape in op.tags:
        return 0
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return _probe(op, tuple(_describe(leaf) for leaf in leaves), spec, torch.get_num_threads())


def _is_plain_loop(op: OpOverload, args: Any) -> bool:
    """A pointwise operator on one dtype writes its result and nothing else."""
    dtypes = {t.dtype for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor) and t.dim()}
    return torch.Tag.pointwise in op.tags and len(dtypes) <= 1


def _describe(leaf: Any) -> Any:
    """A hashable stand-in for one argument: tensors by shape, stride, dtype and device."""
    if isinstance(leaf, torch.Tensor):
        shape = tuple(size_hint(d) for d in leaf.shape)
        stride = tuple(size_hint(d) for d in leaf.stride())
        return _Described(shape, stride, leaf.dtype, str(leaf.device))
    return size_hint(leaf) if isinstance(leaf, torch.SymInt) else leaf


class _Described(tuple[Any, ...]):
    """Shape, stride, dtype and device of a tensor argument."""

    __slots__ = ()

    def __new__(cls, *parts: Any) -> "_Described":
        return super().__new__(cls, parts)

    @property
    def span(self) -> int:
        """Elements from the first to the last, gaps included."""
        shape, stride, *_ = self
        if 0 in shape:
            return 0
        return int(1 + sum((d - 1) * s for d, s in zip(shape, stride, strict=True)))

    def make(self) -> torch.Tensor:
        """A tensor of zeros like the argument."""
        shape, stride, dtype, device = self
        return torch.zeros(self.span, dtype=dtype, device=device).as_strided(shape, stride)


@functools.lru_cache(maxsize=4096)
def _probe(op: OpOverload, described: tuple[Any, ...], spec: Any, threads: int) -> int:
    """Run the operator once and watch the allocator; 0 where it cannot be run."""
    tensors = [d for d in described if isinstance(d, _Described)]
    if sum(d.span * d[2].itemsize for d in tensors) > _MAX_PROBE_BYTES:
        return 0
    try:
        cuda = sorted({d[3] for d in tensors if d[3].startswith("cuda")})
        with disable_modes(), torch.no_grad(), torch.random.fork_rng():
            leaves = [d.make() if isinstance(d, _Described) else d for d in described]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            watch = _watch_cuda if cuda else _watch_cpu
            return watch(lambda: op(*args, **kwargs))
    except Exception as error:  # zeros may be no valid input, or the user's profiler is on
        log.debug("no probe of %s: %s", op, error)
        return 0


def _watch_cpu(call: Callable[[], Any]) -> int:
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = call()
    assert watched.profiler is not None
    assert watched.profiler.kineto_results is not None
    events = [
        (event.start_ns(), order, event.nbytes())
        for order, event in enumerate(watched.profiler.kineto_results.events())
        if event.name() == "[memory]"
    ]
    live = peak = 0
    for *_, nbytes in sorted(events):
        live += nbytes
        peak = max(peak, live)
    del result
    return peak - live


def _watch_cuda(call: Callable[[], Any]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    scratch = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del result
    return scratch


def _attention_tiles(query: Any, key: Any) -> tuple[int, int]:
    """Rows of queries and of keys that one thread of the CPU kernel holds at a time."""
    queries, keys = size_hint(query.shape[2]), size_hint(key.shape[2])
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(rows, queries), min(512, keys)


def _attention_forward(args: Any, result: Any) -> int:
    """Per thread: scores, their maxima and sums, and one tile of output, in float32 or wider."""
    query, key = args[0], args[1]
    rows, columns = _attention_tiles(query, key)
    wide = max(4, query.element_size())
    per_thread = rows * (columns + 2 + size_hint(query.shape[3])) * wide
    if query.element_size() < wide:
        per_thread += rows * columns * query.element_size()
    return int(per_thread * torch.get_num_threads())


def _attention_backward(args: Any, result: Any) -> int:
    """Per thread: scores and their gradients; once: a row of products."""
    query, key = args[1], args[2]
    rows, columns = _attention_tiles(query, key)
    wide = max(4, query.element_size())
    per_thread = 2 * rows * columns * wide
    if query.element_size() < wide:
        per_thread += 2 * rows * columns * query.element_size()
    return int(per_thread * torch.get_num_threads() + rows * wide)


_FORMULAS: dict[str, Callable[[Any, Any], int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention_forward,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
_NO_SCRATCH = frozenset(
    "aten.mm aten.bmm aten.addmm aten.baddbmm aten.mv aten.dot aten.empty aten.empty_like "
    "aten.full aten.zeros aten.ones aten.arange aten.scalar_tensor aten.lift_fresh_copy "
    "aten.new_zeros aten.new_empty aten.new_ones aten.new_full aten.zeros_like aten.ones_like "
    "aten.full_like aten.sum aten.mean aten.cat".split()
)
