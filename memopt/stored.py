"""What was written earlier, read back with suspicion: files of plans, their fields, caches.

A file may be cut off, edited, of another program, or no file at all. What a user names is refused
with the reason; what a cache holds carries a hash, and is made again where that is not its own.
"""

import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memopt._torch import write_atomic
from memopt.errors import PlanError
from memopt.units import format_bytes

log = logging.getLogger(__name__)

_MOST_BYTES = 2**26  # of a plan; a graph of a million nodes has one of a third of that


def read_plan_text(path: str | os.PathLike[str]) -> str:
    """The text of a plan's file.

    Raises:
        PlanError: there is no such file, or it is none that could be a plan.
    """
    shown = repr(os.fspath(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise PlanError(f"cannot read the plan {shown}: it is no regular file; name one")
        with open(path, encoding="utf-8") as file:
            if (size := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
                raise PlanError(
                    f"cannot read the plan {shown}: it has {format_bytes(size)}, and a plan has "
                    f"at most {format_bytes(_MOST_BYTES)}; name the file of a plan"
                )
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no possible path
        raise PlanError(
            f"cannot read the plan {shown}: {error}; name the file of a plan"
        ) from error


def parse(text: str, what: str, remedy: str) -> Any:
    """The JSON in a plan's text.

    Raises:
        PlanError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not a {what}: not JSON ({error}); {remedy}") from error


def some_list(value: object, least: int = 0) -> Sequence[Any]:
    """A list of ``least`` entries or more."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.100} is no list")
    if len(value) < least:
        raise ValueError("a list is empty")
    return value


def text_of(value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is no text")
    return value


def number(value: object, least: float = -math.inf) -> float:
    """A finite number of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r:.100} is no finite number")
    if value < least:
        raise ValueError(f"{value!r} is less than {least}")
    return float(value)


def count(value: object, least: int = 1) -> int:
    """A whole number of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TypeError(f"{value!r:.100} is no number from {least} on")
    return value


def signature(body: Mapping[str, object]) -> str:
    """A hash of a JSON object, by which it is known whether it was changed."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def keep(path: Path, body: Mapping[str, object]) -> None:
    """Write an object to a cache; where that cannot be done, nothing is kept.

    Args:
        path: of its file, which appears whole or not at all.
        body: plain JSON types.
    """
    try:
        write_atomic(str(path), json.dumps({**body, "hash": signature(body)}), make_dirs=True)
    except OSError as error:
        log.warning("%s is not kept: %s", path, error)


def kept(path: Path) -> dict[str, Any] | None:
    """What ``keep`` wrote, if it is all there and nothing else."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        given = body.pop("hash")
        return body if isinstance(body, dict) and given == signature(body) else None
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None
