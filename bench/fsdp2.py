"""FSDP2 on the ranks of one machine: bytes, seconds and losses of each, by who compiles blocks.

A Llama of `transformers` under ``fully_shard``, block by block, as training scripts have it: each
block is compiled before it is sharded, so one graph serves all of them. Every peer has processes
of its own, one a rank, with one thread each; peers take turns.
"""

import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from bench.peers import PEERS as TABLE
from bench.peers import PeakOf
from bench.runner import Worker, WorkerError
from bench.sharded_rank import Rank, Setting
from bench.tables import markdown

CASE = "fsdp2"
PEERS = ("eager", "inductor", "memopt", "memopt @ half of inductor", "memopt min")
STEPS = 4
MIB = 2**20
Row = dict[str, Any]
_WORDS = """\
{model} of the zoo on {world} ranks of one machine, under `fully_shard` block by block; each block
is compiled before it is sharded, and what is around the blocks runs in eager. Peaks are those of
each rank, above what is resident when the step starts, with the parameters that are gathered. Of
half of Inductor's peak the blocks get what is left without the {gathered:.1f} MiB that FSDP2
gathers at a time, two blocks and what is in no block, and the {head:.1f} MiB that head and loss
take in eager. `loss error` is the largest of {steps} steps of AdamW on all ranks, relative to
eager's.
"""


def run(
    device: str,
    say: Callable[[str], None],
    *,
    setting: Setting | None = None,
    peers: Sequence[str] = PEERS,
) -> list[Row]:
    """Rows of kind ``fsdp2``, one for each peer; figures of ranks are lists.

    Args:
        device: ``"cpu"`` for gloo, ``"cuda"`` for nccl.
        say: called with one line per peer.
        setting: what is run, the benchmark's unless another is given.
        peers: names of peers.
    """
    setting = setting or Setting(device=device)
    shared = {"kind": CASE, "case": CASE, "model": setting.model, "world": setting.world}
    if device == "cuda" and torch.cuda.device_count() < setting.world:
        why = f"{setting.world} GPUs are needed, and {torch.cuda.device_count()} are here"
        return [shared | {"peer": name, "status": "skipped", "error": why} for name in peers]
    rows: dict[str, Row] = {}
    started: dict[str, list[Worker]] = {}
    with _ended(started), tempfile.TemporaryDirectory() as folder:
        for name in peers:
            row = rows[name] = shared | {"peer": name, "status": "ok", "error": ""}
            try:
                row["memory_budget"] = budget = _budget(name, rows)
            except LookupError as error:
                row |= {"status": "skipped", "error": str(error)}
                continue
            home = Path(tempfile.mkdtemp(dir=folder))
            made = [
                partial(Rank, setting, name, budget, home, rank) for rank in range(setting.world)
            ]
            started[name] = [Worker(make) for make in made]
            try:
                found = _together(started[name], "prepare", STEPS)
            except WorkerError as error:
                row |= {"status": "failed", "error": str(error)}
                _end(started.pop(name))
            else:
                row |= {key: [own[key] for own in found] for key in found[0]}
                row["loss_error"] = _loss_error(row, rows.get("eager", row))
            say(f"{CASE}: {name}: {row.get('peak_bytes') or row['error']}")
        for turn in range(setting.rounds):
            for name in random.Random(turn).sample([*started], len(started)):
                seconds = _together(started[name], "time", 2)
                slowest = max(own[-1] for own in seconds)
                rows[name].setdefault("step_seconds_rounds", []).append(slowest)
    for name in started:
        rounds = rows[name].get("step_seconds_rounds")
        rows[name]["step_seconds"] = statistics.median(rounds) if rounds else None
    return [*rows.values()]


@contextmanager
def _ended(started: dict[str, list[Worker]]) -> Iterator[None]:
    """End the ranks that are there when the block ends, however it ends."""
    try:
        yield
    finally:
        for workers in started.values():
            _end(workers)


def _end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.kill()


def _together(workers: Sequence[Worker], method: str, *arguments: object) -> list[Any]:
    """What a method gives on each rank.

    Raises:
        WorkerError: it raised on one rank; others may wait for it for ever.
    """
    for worker in workers:
        worker.start(method, *arguments)
    found: dict[int, Any] = {}
    while len(found) < len(workers):
        missing = {w.fileno(): i for i, w in enumerate(workers) if i not in found}
        for ready in wait([*missing]):
            assert isinstance(ready, int)
            found[missing[ready]] = workers[missing[ready]].result()
    return [found[rank] for rank in range(len(workers))]


def _budget(name: str, rows: Mapping[str, Row]) -> int | float | str | None:
    """The budget of a peer's blocks: of bytes, less what is not the blocks'.

    Raises:
        LookupError: that other peer has no peak.
    """
    budget = TABLE[name].memory_budget
    if not isinstance(budget, PeakOf):
        return budget
    other = rows.get(budget.peer, {})
    if "peak_bytes" not in other:
        raise LookupError(f"{budget.peer} has no peak in this case")
    nbytes = int(min(other["peak_bytes"]) * budget.share)
    return nbytes - int(max(other["gathered_bytes"])) - int(max(other["head_bytes"]))


def _loss_error(row: Row, expected: Row) -> float:
    """The largest difference of a loss from eager's, relative to that."""
    own, theirs = (torch.tensor(each["losses"], dtype=torch.float64) for each in (row, expected))
    return float(((own - theirs) / theirs).abs().max())


def fsdp2_section(rows: Sequence[Row]) -> str:
    """The table of a results file's rows; empty if none were measured."""
    own = [row for row in rows if row["kind"] == CASE]
    if not own:
        return ""
    stock = next((row for row in own if row["peer"] == "inductor" and row["status"] == "ok"), None)
    words = ""
    if stock is not None:
        words = _WORDS.format(
            model=stock["model"],
            world=stock["world"],
            steps=len(stock["losses"][0]),
            gathered=max(stock["gathered_bytes"]) / MIB,
            head=max(stock["head_bytes"]) / MIB,
        )
    columns = (
        "peer", "budget of the blocks MiB", "peak MiB by rank", "peak / Inductor", "step s",
        "step / Inductor", "first step s", "loss error",
    )  # fmt: skip
    return words + "\n" + markdown(columns, [_line(row, stock) for row in own])


def _line(row: Row, stock: Row | None) -> list[str]:
    if row["status"] != "ok":
        text = " ".join(row["error"].split()).replace("|", "\\|")
        return [row["peer"], f"{row['status']}: {text[:80]}", *[""] * 6]
    budget, seconds = row["memory_budget"], row["step_seconds"]
    paired = zip(
        row.get("step_seconds_rounds", ()),
        (stock or {}).get("step_seconds_rounds", ()),
        strict=False,
    )
    ratios = [mine / theirs for mine, theirs in paired]
    peak = max(row["peak_bytes"]) / max(stock["peak_bytes"]) if stock else None
    return [
        row["peer"],
        f"{budget / MIB:.1f}" if isinstance(budget, int) else str(budget or "-"),
        ", ".join(f"{nbytes / MIB:.1f}" for nbytes in row["peak_bytes"]),
        "-" if peak is None else f"{peak:.3f}",
        "-" if seconds is None else f"{seconds:.3f}",
        f"{statistics.median(ratios):.3f}" if ratios else "-",
        f"{max(row['first_step_seconds']):.1f}",
        f"{row['loss_error']:.1e}",
    ]
