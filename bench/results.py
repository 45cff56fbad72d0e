"""Results as JSON: where, when and with what they were measured, and one row per measurement."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.worker import Prepared

SCHEMA_VERSION = 1
HEADER_KEYS = frozenset(
    {"schema_version", "commit", "versions", "device", "seed", "date", "command", "rows"}
)
_VERSIONED = ("memopt", "torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy")


@dataclass(kw_only=True)
class Row:
    """One peer on one case; None where there is nothing to report.

    Attributes:
        status: ``"ok"``, ``"failed"``, ``"infeasible"`` (memopt finds no plan that fits) or
            ``"skipped"`` (a peer it needs has no figures, or its library cannot run here);
            ``error`` says why.
        peak_bytes: highest allocator bytes of one training step above its start.
        end_bytes: the same when the step has ended.
        reserved_bytes: what CUDA's allocator held at most, in all.
        gradient_bytes: bytes of the parameters' gradients, which the peak includes.
        predicted_peak_bytes: the peak that memopt predicts, outputs held; None for other peers.
        step_seconds: median over rounds; ``cpu_seconds`` likewise, of the process. None where
            kernels are interpreted.
        first_step_seconds: first step with empty caches; compilation is the bulk of it.
        gradient_error: see `bench.worker.relative_error`; against the peer ``reference``.
    """

    case: Case
    peer: str
    device: str
    memory_budget: int | float | str | None = None
    status: str = "ok"
    error: str = ""
    peak_bytes: int | None = None
    end_bytes: int | None = None
    reserved_bytes: int | None = None
    gradient_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    step_seconds: float | None = None
    step_seconds_rounds: list[float] = field(default_factory=list)
    cpu_seconds: float | None = None
    first_step_seconds: float | None = None
    loss: float | None = None
    gradient_error: float | None = None
    reference: str = ""

    def take(self, prepared: Prepared, reference: str) -> None:
        """Copy what the worker measured."""
        for name, value in asdict(prepared).items():
            setattr(self, name, value)
        self.reference = reference

    def to_dict(self) -> dict[str, Any]:
        """A flat dict: the case's model, size, outputs and dtype become keys of the row."""
        row = asdict(self)
        case = row.pop("case")
        del case["peers"]
        return {"kind": "step", "case": case.pop("name"), **case, **row}


def header(seed: int, device: str) -> dict[str, Any]:
    """Everything one needs to read the figures: commit, versions, device, seed, date, command."""
    return {
        "schema_version": SCHEMA_VERSION,
        "commit": _commit(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _VERSIONED},
        "device": {
            "type": device,
            "name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "seed": seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    }


def save(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a results file; called after every case, so a run that is cut short keeps its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: it is not a results file, or of another schema version.
    """
    results: dict[str, Any] = json.loads(path.read_text())
    missing = HEADER_KEYS - results.keys()
    if missing:
        raise ValueError(f"{path} is not a results file: it lacks {', '.join(sorted(missing))}")
    if results["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {results['schema_version']}; "
            f"this program reads {SCHEMA_VERSION}: measure again"
        )
    return results


def _commit() -> str | None:
    """The checkout's commit, ``+dirty`` if more than results differ; None outside of git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
        return git("rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
