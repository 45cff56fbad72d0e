"""``memopt bench``: runs ``python -m bench run`` of a checkout; it is no part of the package."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from memopt.errors import ConfigError


def run_bench(
    cases: Sequence[str], *, device: str, quick: bool, out: Path | None, as_json: bool
) -> int:
    """Run the benchmarks, and hand their exit status on.

    Args:
        cases: names; none for the usual ones.
        device: ``"cpu"`` or ``"cuda"``.
        quick: tiny cases, one round.
        out: results file; None for the bench's own, or with ``as_json`` for none that stays.
        as_json: print the results to stdout, and what is said meanwhile to stderr.

    Raises:
        ConfigError: there is no checkout here.
    """
    root = checkout()
    with tempfile.TemporaryDirectory() as scratch:
        target = out or (Path(scratch) / "bench.json" if as_json else None)
        command = [sys.executable, "-m", "bench", "run", *cases, "--device", device]
        command += ["--quick"] if quick else []
        command += ["--out", str(target.absolute())] if target else []
        run = subprocess.run(
            command, cwd=root, stdout=sys.stderr.fileno() if as_json else None, check=False
        )
        if as_json and target is not None and target.is_file():
            print(target.read_text(encoding="utf-8").rstrip())
    return run.returncode


def checkout() -> Path:
    """The root of the checkout that is the current folder, or that memopt is imported from.

    Raises:
        ConfigError: neither is one.
    """
    places = Path.cwd(), Path(__file__).parents[2]
    for root in places:
        if (root / "bench" / "__main__.py").is_file() and (root / "memopt" / "cli").is_dir():
            return root
    raise ConfigError(
        f"the benchmarks are not in the installed package, and {os.getcwd()!r} is no checkout of "
        "memopt: run it from the root of one"
    )
