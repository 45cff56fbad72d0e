"""Train a small Llama on real text four ways and compare bytes, seconds and losses.

``python -m bench.demo`` needs no GPU, no download and a few minutes, most of them compilation.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from bench.zoo import Inputs, step
from bench.zoo.hugging_face import llama

TEXT = Path(__file__).parent / "data" / "alice.txt"
OUT = Path("demo-out")
MIB = 2**20
BATCH, LENGTH, STEPS, WARMUP_STEPS = 4, 512, 8, 2
EXPLAINED_BUDGET = 0.5


@dataclass
class Column:
    """One way to train, and what came of it."""

    title: str
    prepare: Callable[[nn.Module], Any]
    peak_bytes: int = 0
    first_step_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def _memopt(budget: float | str) -> Callable[[nn.Module], Any]:
    options: dict[str, Any] = {"memory_budget": budget}
    return lambda model: torch.compile(model, backend="memopt", options=options)


def columns() -> list[Column]:
    """Eager, stock Inductor, and memopt under two budgets."""
    return [
        Column("eager", lambda model: model),
        Column("Inductor", torch.compile),
        Column("memopt, budget 0.5", _memopt(EXPLAINED_BUDGET)),
        Column("memopt, budget min", _memopt("min")),
    ]


def encode(text: str) -> tuple[Tensor, int]:
    """Character ids of the text, and the size of the alphabet."""
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def batches(tokens: Tensor, device: str, steps: int) -> list[Inputs]:
    """The same random crops for every column."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        result.append({"input_ids": ids.to(device), "labels": ids.to(device)})
    return result


def new_model(vocab: int, device: str) -> nn.Module:
    """A Llama of four layers with random weights, the same for every column."""
    torch.manual_seed(0)
    return llama(4, vocab, 256, 704, 8, 4, batch=BATCH, length=LENGTH).build().to(device)


def train(
    column: Column, model: nn.Module, data: list[Inputs], tick: Callable[[str], None]
) -> None:
    """Train on every batch and fill the column; the last step is also measured in bytes."""
    torch._dynamo.reset()
    device = data[0]["input_ids"].device
    compiled = column.prepare(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for index, batch in enumerate(data):
        tick(f"step {index + 1} of {len(data)}" if index else "compiling")
        start = time.perf_counter()
        if index == len(data) - 1:
            with Meter(device) as meter:
                loss = step(compiled, batch)
            column.peak_bytes = meter.peak_bytes
        else:
            loss = step(compiled, batch)
            column.step_seconds.append(_elapsed(start, device))
        column.losses.append(loss.item())
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    column.first_step_seconds = column.step_seconds[0]
    del column.step_seconds[:WARMUP_STEPS]


def _elapsed(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def table(done: list[Column]) -> Table:
    """The comparison, one column per way to train."""
    result = Table(title="One training step (forward and backward) of the same model")
    result.add_column("")
    for column in done:
        result.add_column(column.title, justify="right")
    eager = done[0]
    lines: list[tuple[str, Callable[[Column], str]]] = [
        ("peak bytes", lambda c: f"{c.peak_bytes:,}"),
        ("peak, of eager's", lambda c: f"{c.peak_bytes / eager.peak_bytes:.0%}"),
        ("step, ms", lambda c: f"{1000 * statistics.median(c.step_seconds):.0f}"),
        ("first step (compiles), s", lambda c: f"{c.first_step_seconds:.1f}"),
        ("first loss", lambda c: f"{c.losses[0]:.4f}"),
        ("last loss", lambda c: f"{c.losses[-1]:.4f}"),
    ]
    for title, cell in lines:
        result.add_row(title, *(cell(column) for column in done))
    return result


def explain(model: nn.Module, inputs: Inputs) -> None:
    """Save the memory timeline of the half-peak plan as a picture and as a page."""
    torch._dynamo.reset()
    arguments: dict[str, Any] = dict(inputs)
    report = memopt.explain(model, **arguments, options={"memory_budget": EXPLAINED_BUDGET})
    OUT.mkdir(exist_ok=True)
    report.plot(OUT / "timeline.png")
    report.save(OUT / "timeline.html")


class Stages:
    """Shows what is going on and for how long: live in a terminal, line by line elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        layout = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._live = Progress(*layout, console=console, disable=not console.is_terminal)

    def __enter__(self) -> "Stages":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[str], None]]:
        """One line of progress; the value yielded replaces the text after the title."""
        task = self._live.add_task(title, total=1)
        start = time.perf_counter()
        self._note(f"{title} ...")
        yield lambda text: self._live.update(task, description=f"{title}: {text}")
        self._live.update(task, completed=1, description=f"{title}: done")
        self._note(f"{title}: done in {time.perf_counter() - start:.0f} s")

    def _note(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False)
            sys.stdout.flush()


def main() -> int:
    """Run the four columns, print the table, save the memory timeline."""
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, vocab = encode(TEXT.read_text(encoding="utf-8"))
    data = batches(tokens, device, STEPS)
    done = columns()
    console.print(
        f"A 4-layer Llama learns {TEXT.name} ({len(tokens):,} characters) on {device}: "
        f"{STEPS} steps of {BATCH} x {LENGTH} tokens, four ways."
    )
    with Stages(console) as stages:
        for column in done:
            with stages.stage(column.title) as tick:
                train(column, new_model(vocab, device), data, tick)
    console.print(table(done))
    with Stages(console) as stages, stages.stage("explaining the plan"):
        explain(new_model(vocab, device), data[0])
    console.print(f"Memory over the step: {OUT}/timeline.png, and to explore, {OUT}/timeline.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
