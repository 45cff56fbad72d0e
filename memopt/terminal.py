"""What the command line shows: results on stdout, all else on stderr."""

import json
from typing import Any

from rich.console import Console


def show(result: Any) -> None:
    """Print a result for people: anything that rich renders."""
    Console().print(result)


def show_json(value: object) -> None:
    """Print a result for programs: JSON, and nothing else."""
    print(json.dumps(value, indent=2, allow_nan=False))


def tell(line: str, console: Console | None = None) -> None:
    """Say something beside the result: on the standard error, unless a console is given."""
    shown = console or Console(stderr=True)
    shown.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
