"""Attention with a span for each head: time and scratch beside what PyTorch has for it.

Peers take turns on the same inputs. The mask of the dense form is made anew in every call, as a
model makes it; FlexAttention's blocks are made once, and its backward does not run on the CPU.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.meter import Meter
from bench.tables import markdown
from memopt.kernels.band_tiles import seen_scores
from memopt.kernels.banded_attention import ATTENTION

CASE = "banded_attention"
LENGTHS = (2048, 8192)
HEADS, WIDTH, SINKS = 8, 64, 64
# Spans as parts of the length, one for each head.
PARTS = (16, 16, 8, 8, 8, 4, 2, 1)
_ROUNDS = 3

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]
_WORDS = """\
`(1, 8, N, 64)`, float32, spans of `N / 16` (two heads), `N / 8` (three), `N / 4`, `N / 2` and `N`,
and 64 sinks: the share of a causal mask's scores that are seen is the first line's. Median
milliseconds of the forward and of forward and backward, peers in turn, the most that either
allocates beside its results, and what says which scores are seen and is kept between calls.
"""


def run(
    device: str,
    say: Callable[[str], None],
    *,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = _ROUNDS,
    compiled: bool = True,
) -> list[Row]:
    """Rows of kind ``attention``, one for each length and peer.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        say: called with one line per row.
        lengths: of the sequences.
        rounds: of timing.
        compiled: whether FlexAttention takes part, which is only of use when compiled.
    """
    rows = []
    for length in lengths:
        torch.manual_seed(0)
        inputs = [torch.randn(1, HEADS, length, WIDTH, device=device) for _ in range(3)]
        for row in _measure(inputs, _peers(inputs, compiled), rounds):
            say(f"{CASE} of {length}: {row['peer']}: {row['seconds']}")
            rows.append(row)
    return rows


def _peers(inputs: Sequence[Tensor], compiled: bool) -> Mapping[str, Attention]:
    q = inputs[0]
    length, device = q.shape[2], q.device
    spans = [length // part for part in PARTS]
    table = torch.tensor(spans, device=device)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = torch.arange(length, device=device)
        behind = own[:, None] - own
        near = (behind < table[:, None, None]) | (own < SINKS)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(near & (behind >= 0))[None])

    peers: dict[str, Attention] = {
        "memopt": lambda q, k, v: ATTENTION(q, k, v, spans, [SINKS] * HEADS, WIDTH**-0.5)[0],
        "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "dense mask": dense,
    }
    if compiled:
        peers["flex_attention"] = _Flex(table, length)
    return peers


class _Flex:
    """FlexAttention, with its blocks of scores for a table of spans."""

    def __init__(self, table: Tensor, length: int) -> None:
        def visible(_b: Tensor, head: Tensor, own: Tensor, key: Tensor) -> Tensor:
            return (own >= key) & ((own - key < table[head]) | (key < SINKS))

        make = torch.compile(create_block_mask)
        self.mask = make(visible, 1, HEADS, length, length, device=table.device.type)
        self.call = torch.compile(flex_attention)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = self.call(q, k, v, block_mask=self.mask)
        return result

    @property
    def kept_bytes(self) -> int:
        """Of the numbers of blocks, and which they are, by queries and by keys."""
        return sum(x.nbytes for x in self.mask.as_tuple() if isinstance(x, Tensor))


def _measure(
    inputs: Sequence[Tensor], peers: Mapping[str, Attention], rounds: int
) -> Iterable[Row]:
    device, length = inputs[0].device, inputs[0].shape[2]
    spans = [length // part for part in PARTS]
    seen = seen_scores(inputs[0], inputs[1], spans, [SINKS] * HEADS)
    share = seen / (HEADS * length * (length + 1) // 2)
    leaves = [t.detach().requires_grad_() for t in inputs]
    upstream = torch.ones_like(inputs[0])

    def forward(attention: Attention) -> Tensor:
        with torch.no_grad():
            return attention(*inputs)

    def both(attention: Attention) -> object:
        return torch.autograd.grad(attention(*leaves), leaves, upstream)

    runs = {"forward": forward, "both": both}
    taken: dict[tuple[str, str], list[float]] = {}
    failed: dict[tuple[str, str], str] = {}
    scratch = {}
    for turn in range(rounds + 1):  # the first one warms up
        for peer, attention in peers.items():
            for phase, call in runs.items():
                if (peer, phase) in failed:
                    continue
                if peer == "flex_attention" and phase == "both" and device.type == "cpu":
                    failed[peer, phase] = "no backward on the CPU"
                    continue
                seconds = _seconds(lambda: call(attention), device)  # noqa: B023
                if turn:
                    taken.setdefault((peer, phase), []).append(seconds)
    for peer, attention in peers.items():
        for phase, call in runs.items():
            if (peer, phase) in taken:
                with Meter(device) as meter:
                    result = call(attention)
                scratch[peer, phase] = meter.peak_bytes - meter.end_bytes
                del result
    for peer in peers:
        times = {p: statistics.median(taken[peer, p]) for p in runs if (peer, p) in taken}
        most = max(scratch[peer, phase] for phase in times)
        yield {
            "kind": "attention", "case": CASE, "peer": peer, "length": length, "share": share,
            "seconds": times, "scratch_bytes": most, "status": "ok",
            "kept_bytes": getattr(peers[peer], "kept_bytes", 0),
            "error": failed.get((peer, "both"), ""),
        }  # fmt: skip


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    call()
    return now() - start


def attention_section(rows: Iterable[Row]) -> str:
    """The table of a results file's rows; empty if none were measured."""
    own = [row for row in rows if row["kind"] == "attention"]
    if not own:
        return ""
    lines = []
    for row in own:
        times = [row["seconds"].get(phase) for phase in ("forward", "both")]
        figures = [f"{1e3 * t:.0f}" if t is not None else "-" for t in times]
        known = [row.get(of) for of in ("scratch_bytes", "kept_bytes")]  # older files lack some
        sizes = [f"{nbytes / 2**20:.1f}" if nbytes is not None else "-" for nbytes in known]
        about = [f"{row['peer']}, N = {row['length']}", f"{row['share']:.3f}"]
        lines.append([*about, *figures, *sizes])
    columns = (
        "attention",
        "share seen",
        "forward ms",
        "forward + backward ms",
        "scratch MiB",
        "kept MiB",
    )
    return _WORDS + "\n" + markdown(columns, lines)
