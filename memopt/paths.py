"""Paths that are written to, checked before anything is done that takes long."""

import os
from collections.abc import Sequence
from pathlib import Path

from memopt.errors import ConfigError


def checked_path(path: str | os.PathLike[str], suffixes: Sequence[str]) -> Path:
    """The path, if a file can be written there.

    Args:
        path: of a file; one that exists will be replaced.
        suffixes: that its name may have, without the dot; the first one is offered.

    Raises:
        ConfigError: the suffix is another one, the folder does not exist, or it is a folder.
    """
    target = Path(path)
    allowed = " or ".join(f".{suffix}" for suffix in suffixes)
    if target.suffix.lower().lstrip(".") not in suffixes:
        raise ConfigError(
            f"cannot write {str(target)!r}: the name must end in {allowed}; "
            f"try {str(target.with_suffix('.' + suffixes[0]) if target.name else suffixes[0])!r}"
        )
    if not target.parent.is_dir():
        raise ConfigError(
            f"cannot write {str(target)!r}: the folder {str(target.parent)!r} does not exist; "
            "create it first, or choose another"
        )
    if target.is_dir():
        raise ConfigError(f"cannot write {str(target)!r}: it is a folder; name a file in it")
    return target
