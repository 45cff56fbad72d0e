"""The command ``memopt``: ``explain``, ``plan``, ``advise``, ``calibrate``, ``bench``, ``doctor``.

Nothing here imports torch before a command needs it, so that help and completion are quick.
Results go to stdout, as JSON where that is asked for; all else goes to stderr.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.main import get_command

from memopt._versions import TORCH
from memopt.cli.asked import function_of, lengths_of, made, options_of
from memopt.device import DEVICES
from memopt.errors import MemoptError
from memopt.paths import checked_path
from memopt.progress import working
from memopt.terminal import show, show_json, tell

# What is wrong with a command line: the same class in every version, which keeps it elsewhere.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Keep a training or inference step under a memory budget, with torch.compile.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Make = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="Makes the model and its keyword inputs; of the current folder too.",
        show_default=False,
    ),
]
Size = Annotated[Optional[int], typer.Option(help="Handed to the function.")]  # noqa: UP045
Device = Annotated[
    str,
    typer.Option(
        help="To plan for, such as h100.",
        show_default=False,
        autocompletion=lambda: sorted(DEVICES),
    ),
]
Budget = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The memory_budget, such as 70GiB, 0.5 or min."),
]
Options = Annotated[str, typer.Option(help="More options of memopt, as a JSON object.")]
Html = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Write the report with its timeline to this file."),
]
Beside = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="A page that --html wrote before: shown beside the new one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those behind the command's name; None for the process's own.

    Returns:
        The exit status: 0, or 1 where memopt says no, or 2 where the command was written wrongly;
        the reason is one line on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = get_command(app).main(
            given or ["--help"], prog_name="memopt", standalone_mode=False
        )
    except MemoptError as error:
        _refuse(str(error))
        return 1
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        _refuse(f"torch is not installed; run: pip install 'torch{TORCH.specifier}'")
        return 1
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else "memopt"
        _refuse(f"{error.format_message().rstrip('.')}; see: {where} --help")
        return 2
    return int(status or 0)


@app.command()
def explain(
    make: Make,
    size: Size = None,
    budget: Budget = None,
    options: Options = "{}",
    html: Html = None,
    beside: Beside = None,
    as_json: Json = False,
) -> None:
    """Compile a model here, run it once, and say what was decided, where and at which price."""
    _check_pages(html, beside)
    chosen = options_of(options, budget)
    from memopt.explaining import explain as run

    with working("compiling"):
        model, inputs = made(make, size, "a model, a mapping of its inputs")
        report = run(model, options=chosen, **inputs)
    _report(report, html, beside, as_json)


@app.command()
def plan(
    make: Make,
    device: Device,
    size: Size = None,
    budget: Budget = None,
    options: Options = "{}",
    html: Html = None,
    beside: Beside = None,
    as_json: Json = False,
) -> None:
    """Peak, time and decisions on a device that need not be here, with no memory for the model."""
    _check_pages(html, beside)
    chosen = options_of(options, budget)
    function_of(make)
    from memopt.planning import plan_for

    with working(f"planning for {device}"):
        report = plan_for(
            lambda: made(make, size, "a model, a mapping of its inputs"),
            device=device,
            options=chosen,
        )
    _report(report, html, beside, as_json)


@app.command()
def advise(
    make: Make,
    device: Device,
    budget: Budget = None,
    options: Options = "{}",
    multiple: Annotated[int, typer.Option(min=1, help="Sizes are multiples of it.")] = 1,
    most: Annotated[int, typer.Option(min=1, help="Sizes beyond are not tried.")] = 2**20,
    html: Html = None,
    as_json: Json = False,
) -> int:
    """The largest batch, or length, that fits under a budget in bytes on a device."""
    _check_pages(html)
    chosen = options_of(options, budget)
    function_of(make)
    from memopt.planning import advise as run

    with working(f"trying sizes on {device}") as say:
        advice = run(
            lambda size: made(make, size, "a model, a mapping of its inputs"),
            device=device,
            options=chosen,
            most=most,
            multiple=multiple,
            say=say,
        )
    if as_json:
        report = advice.report and advice.report.to_dict()
        show_json({"size": advice.size, "report": report})
    if advice.report is None:
        _refuse(f"not even {multiple} fits under {chosen['memory_budget']}: raise the budget")
        return 1
    if html is not None:
        tell(f"wrote {advice.report.save(html)}")
    if not as_json:
        show(advice.report)
        show(f"the largest size that fits is {advice.size}")
    return 0


@app.command()
def calibrate(
    make: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="Makes the model, batches to profile, and batches that are held out.",
            show_default=False,
        ),
    ],
    save: Annotated[Path, typer.Option(help="Write the plan to this file.", show_default=False)],
    size: Size = None,
    budget: Annotated[float, typer.Option(help="Share of keys that may be read.")] = 0.5,
    guard: Annotated[float, typer.Option(help="Relative rise of the held-out loss.")] = 0.05,
    lengths: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Lengths that must be among the batches, as 2048,4096."),
    ] = None,
    block: Annotated[int, typer.Option(help="Tokens on a side of a block.")] = 64,
    as_json: Json = False,
) -> None:
    """Find how far every head of a model has to look back, on data; guarded by a held-out loss."""
    checked_path(save, ("json",))
    wanted = lengths_of(lengths)
    from memopt.attention import calibrate as run

    with redirect_stdout(sys.stderr):  # it has bars of its own
        model, batches, holdout = made(make, size, "a model, batches, held-out batches")
        found = run(
            model,
            batches,
            holdout=holdout,
            budget=budget,
            guard=guard,
            lengths=wanted,
            block=block,
        )
    tell(f"wrote {found.save(save)}")
    if as_json:
        print(found.to_json())
    else:
        show(found)


@app.command()
def bench(
    cases: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Names of cases; all that are usual if none is given."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny cases, one round.")] = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the results to this file."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure memopt and its peers: from a checkout, whose folder bench/ it runs."""
    from memopt.cli.benching import run_bench

    return run_bench(cases or [], device=device, quick=quick, out=out, as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> int:
    """Look at what memopt needs: versions, device, compiler, caches; and what is off, and why."""
    try:
        with working("looking"):
            from memopt.cli.doctor import examine

            diagnosis = examine()
    except (ImportError, OSError) as error:
        from memopt.cli.findings import without_torch

        diagnosis = without_torch(error)
    if as_json:
        show_json(diagnosis.to_dict())
    else:
        show(diagnosis)
    return 0 if diagnosis.is_healthy else 1


def _check_pages(html: Path | None, beside: Path | None = None) -> None:
    """Before anything is done that takes long."""
    if beside is not None and html is None:
        raise typer.BadParameter("it takes --html, the page to write", param_hint="--beside")
    if html is not None:
        checked_path(html, ("html", "htm"))
    if beside is not None:
        from memopt.report.page import read_page

        read_page(beside)


def _report(report: Any, html: Path | None, beside: Path | None, as_json: bool) -> None:
    if html is not None:
        tell(f"wrote {report.save(html, beside=beside)}")
    if as_json:
        show_json(report.to_dict())
    else:
        show(report)


def _refuse(reason: str) -> None:
    """One line, whatever the reason is made of."""
    print(f"memopt: {' '.join(reason.split())}", file=sys.stderr)
