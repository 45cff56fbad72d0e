"""Compile time of a deep model: the first step of a fresh process, with cold and warm caches.

Widths are small, because compile time depends on the number of operators and not on their size.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

CASE = "startup_llama32"
PEERS = ("inductor", "memopt", "memopt 0.5")
PHASES = ("cold", "warm")
LAYERS, TINY_LAYERS = 32, 2
_TURNS = 5


def run(device: str, say: Callable[[str], None], *, layers: int = LAYERS) -> list[dict[str, Any]]:
    """One row per peer and phase; ``seconds`` is the first whole training step.

    With warm caches it is the median of several processes, between which peers take turns.
    """
    with ExitStack() as stack:
        caches = {peer: stack.enter_context(tempfile.TemporaryDirectory()) for peer in PEERS}
        phases = [(peer, "cold") for peer in PEERS] + [(peer, "warm") for peer in PEERS] * _TURNS
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for peer, phase in phases:
            row = _measure(peer, device, layers, caches[peer])
            runs.setdefault((peer, phase), []).append(row)
            say(f"{CASE}: {peer}, {phase}: {row['seconds'] or row['error']}")
    return [
        {"kind": "startup", "case": CASE, "peer": peer, "phase": phase}
        | _median(runs[peer, phase])
        for peer in PEERS
        for phase in PHASES
    ]


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the run in the middle; one that failed, where one did."""
    failed = [row for row in rows if row["status"] != "ok"]
    return failed[0] if failed else sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2]


def _measure(peer: str, device: str, layers: int, cache_dir: str) -> dict[str, Any]:
    """Run the child process on one cache folder and read its last line."""
    command = [sys.executable, "-m", "bench.startup", peer, device, str(layers)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache_dir}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    result: dict[str, Any] = {
        "layers": layers,
        "device": device,
        "status": "ok",
        "error": "",
        "seconds": None,
    }
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return result | {"status": "failed", "error": lines[-1]}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result | measured


def _child(peer_name: str, device: str, layers: int) -> None:
    """Compile, run one training step, and print the seconds as JSON."""
    import torch

    from bench.peers import PEERS as TABLE
    from bench.peers import resolve_budget
    from bench.worker import compile_for
    from bench.zoo import step
    from bench.zoo.hugging_face import llama

    recipe = llama(layers, 512, 64, 128, 4, 2, batch=2, length=64)
    module, inputs = recipe.build().to(device), recipe.inputs(0)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    peer = TABLE[peer_name]
    start = time.perf_counter()
    model = compile_for(peer, module, resolve_budget(peer, {}), device)
    step(model, inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("layers", type=int)
    arguments = parser.parse_args()
    _child(arguments.peer, arguments.device, arguments.layers)
