"""``python -m tests.fuzz --seed 7``: one random model; ``--count 100``: so many from there on."""

import argparse
import collections
import dataclasses
import time

import torch

from tests.fuzz.cases import KINDS, Case
from tests.fuzz.checks import Verdict, check
from tests.fuzz.models import MOST_STEPS


def main() -> int:
    """Checks models, prints what is not as eager, and ends with 1 if anything was not."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--lowering", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--kind", choices=KINDS, default="float64")
    parser.add_argument("--verbose", action="store_true", help="print what is as eager, too")
    parser.add_argument("--shrink", action="store_true", help="leave out what a failure needs not")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kinds: collections.Counter[str] = collections.Counter()
    for seed in range(asked.seed, asked.seed + asked.count):
        start = time.perf_counter()
        verdict = check(Case(seed, kind=asked.kind), lowering=asked.lowering)
        kinds[verdict.kind] += 1
        kinds["refused"] += verdict.refused
        if verdict.kind != "same" or asked.verbose or asked.count == 1:
            seconds = time.perf_counter() - start
            print(f"{seed}: {verdict.kind} in {seconds:.1f} s: {verdict.detail}", flush=True)
        if asked.shrink and verdict.kind not in ("same", "torch"):
            _shrink(Case(seed, kind=asked.kind), verdict, asked.lowering)
    print(dict(kinds))
    return int(any(kinds[kind] for kind in ("wrong", "crash", "memory")))


def _shrink(case: Case, verdict: Verdict, lowering: str) -> None:
    """Leave out one step after another, as long as it fails alike."""
    without: set[int] = set()
    for i in range(MOST_STEPS):
        fewer = dataclasses.replace(case, without={*without, i})
        if check(fewer, lowering=lowering).kind == verdict.kind:
            without.add(i)
    case = dataclasses.replace(case, without=without)
    print(f"{check(case, lowering=lowering)}\n{case}\n{case.model()}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
