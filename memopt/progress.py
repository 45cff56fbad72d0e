"""A progress bar for work that takes long, and none for work that does not."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
_QUIET_SECONDS = 2.0


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
