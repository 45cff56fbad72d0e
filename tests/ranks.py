"""Processes that are the ranks of a job, which run functions of the tests side by side."""

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 240.0
_PRELOADED = ("torch._inductor.compile_fx", "torch.distributed.tensor.parallel", "memopt.backend")


class Ranks:
    """Gloo ranks on this machine, started once for many calls.

    Args:
        world: how many.
        folder: where they meet.
    """

    def __init__(self, world: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_PRELOADED])
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, folder / "store"))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """What a function of a module gives on each rank.

        Raises:
            AssertionError: on one rank it raised or took too long; the ranks are of no more use,
                as the others may wait for it for ever.
        """
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            missing = [pipe for i, pipe in enumerate(self._pipes) if i not in results]
            ready = wait(missing, TIMEOUT_SECONDS)
            assert ready, f"ranks {sorted(set(range(len(self._pipes))) - set(results))} hang"
            for rank, pipe in enumerate(self._pipes):
                if pipe in ready:
                    ok, results[rank] = pipe.recv()
                    assert ok, f"rank {rank}: {results[rank]}"
        return [results[rank] for rank in range(len(results))]

    def close(self) -> None:
        """End the processes, whatever they do."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def ranks(world: int) -> Iterator[Ranks]:
    """Ranks, ended behind the block."""
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(world, Path(folder))
        try:
            yield started
        finally:
            started.close()


def ends(world: int, function: Callable[..., Any], *arguments: object) -> list[str]:
    """The errors that end the processes of ranks, as a launcher without a watch leaves them.

    Raises:
        AssertionError: a rank is still there after `TIMEOUT_SECONDS`, or it raised nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = []
        for rank in range(world):
            own = (function.__module__, function.__qualname__, arguments)
            process = context.Process(target=_raise, args=(rank, world, folder, *own))
            process.start()
            processes.append(process)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        assert not hanging, f"ranks {hanging} hang"
        return [(folder / f"{rank}.txt").read_text() for rank in range(world)]


def _raise(
    rank: int, world: int, folder: Path, module: str, name: str, arguments: tuple[object, ...]
) -> None:
    _join(rank, world, folder / "store")
    error = ""
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except Exception:
        error = traceback.format_exc()
    (folder / f"{rank}.txt").write_text(error)


def _join(rank: int, world: int, store: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def _serve(pipe: Connection, rank: int, world: int, store: Path) -> None:
    _join(rank, world, store)
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # others may be gone: nobody is waited for
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            answer = True, getattr(importlib.import_module(module), name)(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        try:
            pipe.send(answer)
        except BrokenPipeError:
            os._exit(1)
