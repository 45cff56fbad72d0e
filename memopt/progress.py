"""A progress bar for work that takes long, and none for work that does not."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from threading import Timer
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from memopt.terminal import tell

T = TypeVar("T")
_QUIET_SECONDS = 2.0

Say = Callable[[str], None]


def advancing(
    label: str, items: Sequence[T], console: Console | None = None, quiet: float = _QUIET_SECONDS
) -> Iterator[T]:
    """The items, one by one; on a terminal a bar appears once they have taken that long.

    Args:
        label: what is done to them.
        items: each is a step.
        console: where to draw; None for the standard error.
        quiet: seconds without a bar.
    """
    shown = console or Console(stderr=True)
    start, bar = time.perf_counter(), Progress(console=shown, transient=True)
    task = bar.add_task(label, total=len(items))
    try:
        for item in items:
            yield item
            bar.advance(task)
            late = time.perf_counter() - start > quiet
            if late and shown.is_terminal and not bar.live.is_started:
                bar.start()
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def working(
    label: str, console: Console | None = None, quiet: float = _QUIET_SECONDS
) -> Iterator[Say]:
    """While something runs whose steps nobody can count: on a terminal a bar, if it takes long.

    What is printed meanwhile, as by a model, goes to the standard error: it is not the result.

    Args:
        label: what is done.
        console: where the bar is drawn; None for the standard error.
        quiet: seconds without a bar.

    Yields:
        What says a line meanwhile, above the bar.
    """
    shown = console or Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=shown, transient=True, redirect_stdout=False)
    bar.add_task(label, total=None)
    timer = Timer(quiet, bar.start)
    timer.daemon = True
    if shown.is_terminal:
        timer.start()
    try:
        with redirect_stdout(sys.stderr):
            yield lambda line: tell(line, shown)
    finally:
        timer.cancel()
        if timer.is_alive():
            timer.join()  # else the bar could start once it was stopped
        if bar.live.is_started:
            bar.stop()
