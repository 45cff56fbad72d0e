"""``memopt plan`` and ``memopt advise``: what fits on a device that is not here.

Both take ``module:function``. The function makes the model and its keyword inputs, on tensors
that take no memory; for ``advise``, of the size that it is given.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from memopt.errors import ConfigError, MemoptError
from memopt.planning import Make, advise, plan_for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 1 where memopt says no, with the reason on stderr."""
    asked = _parser().parse_args(arguments)
    console = Console()
    try:
        return int(asked.run(asked, console) or 0)
    except MemoptError as error:
        print(f"memopt: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memopt", description=__doc__)
    commands = parser.add_subparsers(required=True)
    plan = commands.add_parser("plan", help="peak, time and decisions on a device")
    plan.add_argument("--size", type=int, help="handed to the function")
    plan.add_argument("--html", help="write the report with its timeline to this file")
    plan.set_defaults(run=_plan)
    largest = commands.add_parser("advise", help="the largest size that fits under a budget")
    largest.add_argument("--multiple", type=int, default=1, help="sizes are multiples of it")
    largest.add_argument("--most", type=int, default=2**20, help="sizes beyond are not tried")
    largest.set_defaults(run=_advise)
    for command in (plan, largest):
        command.add_argument("make", metavar="module:function")
        command.add_argument("--device", required=True, help="such as h100")
        command.add_argument("--budget", help="memory_budget, such as 70GiB, 0.5 or min")
        command.add_argument("--options", default="{}", help="more options, as JSON")
    return parser


def _plan(asked: argparse.Namespace, console: Console) -> None:
    make = _function(asked.make)
    size = [] if asked.size is None else [asked.size]
    report = plan_for(lambda: make(*size), device=asked.device, options=_options(asked))
    console.print(report)
    if asked.html:
        report.save(asked.html)


def _advise(asked: argparse.Namespace, console: Console) -> int:
    advice = advise(
        _function(asked.make),
        device=asked.device,
        options=_options(asked),
        most=asked.most,
        multiple=asked.multiple,
        say=lambda line: console.print(line, style="dim"),
    )
    if advice.report is None:
        console.print(f"not even {asked.multiple} fits")
        return 1
    console.print(advice.report)
    console.print(f"the largest size that fits is {advice.size}", style="bold")
    return 0


def _options(asked: argparse.Namespace) -> dict[str, Any]:
    try:
        options = json.loads(asked.options)
    except ValueError as error:
        raise ConfigError(f"--options {asked.options!r} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"--options {asked.options!r}: allowed is an object")
    if asked.budget is not None:
        options["memory_budget"] = _number(asked.budget)
    return options


def _number(text: str) -> str | int | float:
    """A number where the text is one: a budget is a fraction, a number of bytes, or words."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _function(path: str) -> Make:
    """What ``module:function`` names; modules of the current folder are found too."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path!r} names no function: {error}; write module:function") from error
    make: Make = found
    return make
