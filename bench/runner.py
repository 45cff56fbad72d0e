"""Run cases: every peer of a case measured side by side, in turn, in one run."""

import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.peers import Peer, resolve_budget, with_references
from bench.results import Row
from bench.worker import Job, Prepared, Session, serve

Say = Callable[[str], None]
MIB = 2**20
ROUND_SECONDS = 1.0


class WorkerError(RuntimeError):
    """A peer failed; the text says how."""


class Worker:
    """A peer's process, seen from the runner.

    Args:
        make: makes the session there.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.worker", "transformers"])
        self._connection, child = context.Pipe()
        self._process = context.Process(target=serve, args=(child, make))
        self._process.start()
        child.close()

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the worker's session.

        Raises:
            WorkerError: the method raised, or the process died.
        """
        self.start(method, *arguments)
        return self.result()

    def start(self, method: str, *arguments: object) -> None:
        """Call a method, and do not wait for what it gives."""
        with suppress(OSError):  # `result` says that the process has ended
            self._connection.send((method, arguments))

    def result(self) -> Any:
        """What the method that was called last gives.

        Raises:
            WorkerError: the method raised, or the process died.
        """
        try:
            ok, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise WorkerError(f"process ended with code {self._process.exitcode}") from None
        if not ok:
            raise WorkerError(value)
        return value

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`: there is a result, or the process has ended."""
        return self._connection.fileno()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        self.kill()

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self._process.is_alive():
            self._process.kill()


def run_case(
    case: Case,
    *,
    device: str,
    repeats: int,
    seed: int,
    say: Say,
    peers: Sequence[str] | None = None,
    cold: bool = True,
    launches: int = 1,
) -> Iterator[Row]:
    """Measure one case and yield one row per peer.

    Args:
        case: what to run.
        device: ``"cpu"`` or ``"cuda"``.
        repeats: rounds of timing; in every round each peer takes its turn.
        seed: seed of weights, inputs and dropout.
        say: called with one line per measurement.
        peers: names of peers instead of the case's own.
        cold: whether each peer compiles with empty caches of its own; otherwise the user's
            caches are used, which is quicker, and first steps are not reported.
        launches: how often every peer's process is started anew, to share the rounds: where a
            process happens to have its memory is worth a few per cent of a step.
    """
    rows: dict[str, Row] = {}
    jobs: dict[str, Job] = {}
    workers: dict[str, Worker] = {}
    with _closing(workers), tempfile.TemporaryDirectory() as folder:
        for peer in with_references(peers or case.peers):
            row = rows[peer.name] = Row(case=case, peer=peer.name, device=device)
            say(f"{case.name}: {peer.name} ...")
            _prepare(row, peer, jobs, workers, rows, Path(folder), seed, cold)
            say(f"{case.name}: {_one_line(row)}")
            if not cold:
                row.first_step_seconds = None
        timed = [name for name in workers if rows[name].step_seconds is not None]
        cpu_seconds: dict[str, list[float]] = {name: [] for name in timed}
        for launch in range(launches if timed else 0):
            if launch:
                _restart({name: jobs[name] for name in timed}, workers)
            turns = range(launch, repeats, launches)
            _time({name: rows[name] for name in timed}, cpu_seconds, workers, turns, say)
        for name in timed if repeats else ():
            rows[name].step_seconds = statistics.median(rows[name].step_seconds_rounds)
            rows[name].cpu_seconds = statistics.median(cpu_seconds[name])
    yield from rows.values()


@contextmanager
def _closing(workers: dict[str, Worker]) -> Iterator[None]:
    """End the workers that are there when the block ends, however it ends."""
    try:
        yield
    finally:
        for worker in workers.values():
            worker.close()


def _restart(jobs: dict[str, Job], workers: dict[str, Worker]) -> None:
    """End every process, and start another one that has compiled and warmed up again."""
    for worker in workers.values():
        worker.close()
    for name, job in jobs.items():
        workers[name] = Worker(partial(Session, job))
        workers[name].call("prepare")


def _prepare(
    row: Row,
    peer: Peer,
    jobs: dict[str, Job],
    workers: dict[str, Worker],
    rows: dict[str, Row],
    folder: Path,
    seed: int,
    cold: bool,
) -> None:
    """Start the peer's worker and fill the row with what its first steps showed."""
    peaks = {name: r.peak_bytes for name, r in rows.items() if r.peak_bytes is not None}
    reason = peer.unavailable(row.device)
    if reason is None and row.case.size == "bench" and not peer.is_timed_on(row.device):
        reason = "its kernels are interpreted here, which takes minutes at this size"
    if reason is not None:
        row.status, row.error = "skipped", reason
        return
    reference_peer = "inductor" if row.case.has_dropout else "eager"
    try:
        row.memory_budget = resolve_budget(peer, peaks)
    except LookupError as error:
        row.status, row.error = "skipped", str(error)
        return
    job = Job(
        case=row.case,
        peer=peer,
        memory_budget=row.memory_budget,
        device=row.device,
        seed=seed,
        cache_dir=Path(tempfile.mkdtemp(dir=folder)) if cold else None,
        reference=folder / "gradients.pt",
        writes=peer.name == reference_peer,
    )
    jobs[peer.name] = job
    worker = workers[peer.name] = Worker(partial(Session, job))
    try:
        prepared: Prepared = worker.call("prepare")
    except WorkerError as error:
        infeasible = str(error).startswith("BudgetInfeasibleError")
        row.status, row.error = "infeasible" if infeasible else "failed", str(error)
        workers.pop(peer.name).close()
        return
    row.take(prepared, reference_peer)
    if prepared.step_seconds is None:
        row.first_step_seconds = None


def _time(
    rows: dict[str, Row],
    cpu_seconds: dict[str, list[float]],
    workers: dict[str, Worker],
    turns: range,
    say: Say,
) -> None:
    """Add the times of some rounds, each in an order of its own.

    A peer is not always timed after the same other, which may leave caches and clocks worse off.
    """
    names = list(rows)
    for turn in turns:
        for name in random.Random(turn).sample(names, len(names)):
            row = rows[name]
            assert row.step_seconds is not None
            steps = max(1, min(20, round(ROUND_SECONDS / max(row.step_seconds, 1e-4))))
            seconds = workers[name].call("time", steps)
            row.step_seconds_rounds.append(statistics.median(wall for wall, _ in seconds))
            cpu_seconds[name].append(statistics.median(cpu for _, cpu in seconds))
        say(f"{rows[names[0]].case.name}: round {turn + 1} done")


def _one_line(row: Row) -> str:
    if row.peak_bytes is None:
        return f"{row.peer} {row.status}: {row.error}"
    first, error = row.first_step_seconds, row.gradient_error
    return (
        f"{row.peer}: peak {row.peak_bytes / MIB:.1f} MiB"
        f"{'' if first is None else f', first step {first:.1f} s'}"
        f"{'' if error is None else f', gradient error {error:.1e}'}"
    )
