"""Caches of keys and values in decoding: bytes, time and tokens beside transformers' own.

Every cache reads the same prompt, and then, turn by turn, the tokens that a `DynamicCache` leads
to: so all measure the same steps, and one other token does not change all after it.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.tables import markdown
from memopt.memory.meter import storage_key

# transformers, and memopt.cache which imports it, take seconds to import: inside functions.

CASE = "caches"
PROMPT, NEW = 4096, 64
LAYERS, HEADS, KV_HEADS, WIDTH = 4, 8, 2, 64
SPAN, KEPT, RING = 8, 8, 16  # parts of the prompt: tokens of a span, that are kept, of their ring
REFERENCE = "DynamicCache"

Row = dict[str, Any]
_WORDS = """\
A Llama of {layers} layers, {heads} heads of queries and {kv_heads} of keys, {width} wide, with
random weights in float32, decodes {new} tokens after a prompt of {prompt}, one sequence,
uncompiled. Spans are an eighth of the prompt, for half of the heads; {kept} tokens of it are kept
on average, with a ring of {ring}. Bytes are those of storages at the end, on the device and on the
host (on the CPU of the part that stands in for it); times are medians of a token, caches in turn.
Each cache gets the tokens that `DynamicCache` leads to, and `same tokens` is the share after which
it leads to the same next one. Random weights attend to everything alike: what a lossy cache costs
a trained model is not in that figure.
"""


class Peer(NamedTuple):
    """A model, a cache that it fills, and how many bytes of it lie on the host."""

    model: nn.Module
    cache: Any
    host_bytes: Callable[[], int] = lambda: 0


def run(
    device: str, say: Callable[[str], None], *, prompt: int = PROMPT, new: int = NEW
) -> list[Row]:
    """Rows of kind ``caches``, one for each cache.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        say: called with one line per row.
        prompt: tokens of it.
        new: tokens to decode.
    """
    torch.manual_seed(0)
    peers, missing = dict[str, Peer](), dict[str, str]()
    for name, make in _makers(prompt, new, torch.device(device)).items():
        try:
            peers[name] = make()
        except ImportError as error:
            missing[name] = " ".join(str(error).split())
    ids = torch.randint(1, 512, (1, prompt), device=device)
    with torch.no_grad():
        seconds, said = _decoded(peers, ids, new)
    rows = []
    for name, peer in peers.items():
        host = peer.host_bytes()
        row = _row(name, prompt, new) | {
            "device_bytes": stored_bytes(peer.cache) - host,
            "host_bytes": host,
            "seconds": statistics.median(seconds[name]),
            "same": float((said[name] == said[REFERENCE]).float().mean()),
        }
        say(f"{CASE}: {name}: {row['device_bytes']} bytes, {row['seconds']:.4f} s a token")
        rows.append(row)
    for name, why in missing.items():
        say(f"{CASE}: {name}: skipped: {why}")
        rows.append(_row(name, prompt, new) | {"status": "skipped", "error": why})
    return rows


def _row(peer: str, prompt: int, new: int) -> Row:
    about = {"kind": CASE, "case": CASE, "peer": peer, "prompt": prompt, "new": new}
    return about | {"status": "ok", "error": ""}


def _makers(prompt: int, new: int, device: torch.device) -> Mapping[str, Callable[[], Peer]]:
    from transformers import (
        DynamicCache,
        LlamaConfig,
        LlamaForCausalLM,
        QuantizedCache,
        StaticCache,
    )

    from memopt import cache as ours

    length = prompt + new
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HEADS * WIDTH,
        intermediate_size=2 * HEADS * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config).eval().to(device)
    prepared = LlamaForCausalLM(copy.deepcopy(config)).eval()  # which the attention is set in
    prepared.load_state_dict(model.state_dict(), assign=True)
    prepared = ours.prepare(prepared.to(device))
    spans = [[prompt // SPAN] * (KV_HEADS // 2) + [None] * (KV_HEADS // 2)] * LAYERS

    def host() -> Peer:
        cache = ours.HostCache(config, length, heads=1)
        return Peer(prepared, cache, cache.host_bytes)

    def theirs(cache: Callable[[], Any]) -> Callable[[], Peer]:
        return lambda: Peer(model, cache())

    def mine(cache: Callable[[], Any]) -> Callable[[], Peer]:
        return lambda: Peer(prepared, cache())

    return {
        REFERENCE: theirs(partial(DynamicCache, config=config)),
        "StaticCache": theirs(partial(StaticCache, config, length)),
        "QuantizedCache, quanto, 4 bits": theirs(partial(QuantizedCache, "quanto", config)),
        "QuantizedCache, fp8": theirs(partial(QuantizedCache, "fp8", config)),
        "memopt HeadSpanCache": mine(partial(ours.HeadSpanCache, config, spans, length)),
        "memopt QuantizedCache, 8 bits": mine(partial(ours.QuantizedCache, config, length, 8)),
        "memopt QuantizedCache, 4 bits": mine(partial(ours.QuantizedCache, config, length, 4)),
        "memopt EvictingCache": mine(
            partial(ours.EvictingCache, config, prompt // KEPT, length, ring=prompt // RING)
        ),
        "memopt HostCache": host,
    }


def _decoded(
    peers: Mapping[str, Peer], ids: Tensor, new: int
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of each token, and the token that each step leads to, by peer."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    said: dict[str, list[Tensor]] = {name: [] for name in peers}
    for name, peer in peers.items():
        said[name].append(_next(peer, ids))
    for _ in range(new - 1):
        token = said[REFERENCE][-1]
        for name, peer in peers.items():
            _wait(ids.device)
            start = time.perf_counter()
            said[name].append(_next(peer, token))
            _wait(ids.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds, {name: torch.cat(tokens) for name, tokens in said.items()}


def _next(peer: Peer, ids: Tensor) -> Tensor:
    out = peer.model(ids, cache=peer.cache, use_cache=True, logits_to_keep=1)
    token: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
    return token


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stored_bytes(cache: Any) -> int:
    """Bytes of all storages that a cache's layers hold, each once."""
    return sum({storage_key(x): x.untyped_storage().nbytes() for x in _tensors(cache)}.values())


def _tensors(held: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors that an object of whatever class holds, also those that tensors are made of."""
    seen = set() if seen is None else seen
    if id(held) in seen or isinstance(held, type):
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        names = getattr(held, "__tensor_flatten__", None)
        parts: Any = [getattr(held, name) for name in names()[0]] if names else []
        if not parts:
            yield held
    elif isinstance(held, dict):
        parts = held.values()
    elif isinstance(held, (list, tuple)):
        parts = held
    else:
        parts = vars(held).values() if hasattr(held, "__dict__") else ()
    for part in parts:
        yield from _tensors(part, seen)


def caches_section(rows: list[Row]) -> str:
    """The table of a results file's rows; empty if none were measured."""
    own = [row for row in rows if row["kind"] == CASE]
    if not own:
        return ""
    whole = next(row["device_bytes"] for row in own if row["peer"] == REFERENCE)
    columns = ("cache", "device MiB", "of DynamicCache", "host MiB", "ms a token", "same tokens")
    words = _WORDS.format(
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        width=WIDTH,
        prompt=own[0]["prompt"],
        new=own[0]["new"],
        kept=own[0]["prompt"] // KEPT,
        ring=own[0]["prompt"] // RING,
    )
    return words + "\n" + markdown(columns, [_line(row, whole) for row in own])


def _line(row: Row, whole: int) -> list[str]:
    if row["status"] != "ok":
        return [row["peer"], f"{row['status']}: {row['error']}".replace("|", "\\|"), *[""] * 4]
    return [
        row["peer"],
        f"{row['device_bytes'] / 2**20:.2f}",
        f"{row['device_bytes'] / whole:.3f}",
        f"{row['host_bytes'] / 2**20:.2f}",
        f"{1e3 * row['seconds']:.2f}",
        f"{row['same']:.3f}",
    ]
