"""What is written on the command line, read: ``module:function``, budgets, options."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from memopt.errors import ConfigError, shown

Maker = Callable[..., Any]


def function_of(path: str) -> Maker:
    """What ``module:function`` names; modules of the current folder are found too.

    Raises:
        ConfigError: there is no such module, or nothing in it that can be called by that name.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path!r} names no function: {error}; write module:function") from error
    if not callable(found):
        raise ConfigError(f"{path!r} is no function but {found!r}; write module:function")
    maker: Maker = found
    return maker


def made(path: str, size: int | None, parts: str) -> Any:
    """What the function returns, which must be a tuple.

    Args:
        path: of the function, as for ``function_of``.
        size: handed to it, or None for no argument.
        parts: what the tuple has to hold, in words that are parted by commas.

    Raises:
        ConfigError: there is no such function, or it returns something else.
    """
    maker = function_of(path)
    value = maker() if size is None else maker(size)
    if not isinstance(value, tuple) or len(value) != parts.count(",") + 1:
        seen = f"{len(value)} values" if isinstance(value, tuple) else type(value).__name__
        raise ConfigError(f"{path!r} returned {seen}: it has to return {parts}")
    return value


def options_of(text: str, budget: str | None) -> dict[str, Any]:
    """The options of one compilation.

    Args:
        text: a JSON object.
        budget: goes in as ``memory_budget``, unless it is None.

    Raises:
        ConfigError: the text is no JSON object.
    """
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--options {shown(text)} is no JSON: {error}; allowed is an object, such as "
            """'{"lowering": "eager"}'"""
        ) from error
    if not isinstance(options, dict):
        raise ConfigError(f"--options {shown(text)}: allowed is a JSON object")
    if budget is not None:
        options["memory_budget"] = number_of(budget)
    return options


def number_of(text: str) -> str | int | float:
    """A number where the text is one: a budget is a fraction, a number of bytes, or words."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def lengths_of(text: str | None) -> list[int] | None:
    """Numbers of tokens, parted by commas.

    Raises:
        ConfigError: one is no number.
    """
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--lengths {text!r}: allowed are numbers, as 2048,4096") from error
