"""Measure memopt and its peers, compare two measurements, and write the pages of results."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import attention, caches, compare, fsdp2, kernels, plans, plot, retrieval, startup
from bench.cases import CASES, DEFAULT, QUICK_CASES
from bench.peers import PEERS, QUICK
from bench.results import header, load, save
from bench.runner import run_case
from bench.zoo import MODELS

# Cases that are no training steps: what runs each, and what it measures.
OTHERS: Mapping[str, tuple[Callable[..., list[dict[str, Any]]], str]] = {
    startup.CASE: (startup.run, "compile time of a 32-layer Llama, cold and warm"),
    kernels.CASE: (kernels.run, "every kernel: bytes, code for four GPUs, on cuda its speed"),
    retrieval.CASE: (retrieval.run, "what spans by plan and one window keep of a small model"),
    attention.CASE: (attention.run, "attention with spans beside causal, masked and flex"),
    caches.CASE: (caches.run, "caches of keys in decoding, beside those of transformers"),
    fsdp2.CASE: (fsdp2.run, "sharded blocks on two ranks, by who compiles them"),
    plans.CASE: (plans.run, "plans for a GPU that is not here, and how good the search is"),
}
CONSOLE = Console()


def say(line: object) -> None:
    """Print at once, also into a file: runs are long and people watch them."""
    CONSOLE.print(line, highlight=False, soft_wrap=True)
    sys.stdout.flush()


def main(given: Sequence[str] | None = None) -> int:
    """Parse the arguments, the command line's unless others are given, and run the command."""
    arguments = _parser().parse_args(given)
    status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser(
        "list", help="show the cases, with the tags of their models, and the peers"
    )
    command.set_defaults(run=_list)

    command = commands.add_parser("run", help="measure cases and write a results file")
    command.set_defaults(run=_run)
    command.add_argument(
        "cases", nargs="*", help="names of cases; default: all of sizes bench and long"
    )
    command.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s"
    )
    command.add_argument(
        "--launches",
        type=int,
        default=1,
        help="processes of each peer that share the rounds; default: %(default)s",
    )
    command.add_argument(
        "--repeats", type=int, default=7, help="rounds of timing; default: %(default)s"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of weights and inputs; default: %(default)s"
    )
    command.add_argument("--peers", help="comma-separated peers instead of the cases' own")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/latest.json"),
        help="results file, written after every case; default: %(default)s",
    )
    command.add_argument("--quick", action="store_true", help="tiny cases, few peers, one round")

    command.add_argument(
        "--reuse-cache",
        action="store_true",
        help="compile with the user's caches; first steps are not reported",
    )

    command = commands.add_parser(
        "compare", help="print ratios of two results files, after / before"
    )
    command.set_defaults(run=_compare)
    command.add_argument("before", type=Path, help="results file")
    command.add_argument("after", type=Path, help="results file; rows in both are compared")

    command = commands.add_parser("plot", help="make pictures, docs/results.md, README's table")
    command.set_defaults(run=_plot)
    command.add_argument(
        "files", nargs="+", type=Path, help="results files, in the order of the page"
    )
    command.add_argument(
        "--root",
        type=Path,
        default=Path(),
        help="folder of docs/ and README.md, which are overwritten; default: this one",
    )
    command = commands.add_parser(
        "coverage",
        help="count which operators of transformers' models are found, and write a page",
    )
    command.set_defaults(run=_coverage)
    command.add_argument("families", nargs="*", help="model types; rows of others stay")
    _add_page(command, "coverage")
    command = commands.add_parser(
        "scaling",
        help="compute FSDP2 on 8 to 1,024 GPUs from plans, and write a page",
    )
    command.set_defaults(run=_scaling)
    _add_page(command, "scaling")
    return parser


def _add_page(command: argparse.ArgumentParser, name: str) -> None:
    """Where a command that writes a page of its own puts it, and its results file."""
    command.add_argument(
        "--out",
        type=Path,
        default=Path(f"bench/results/{name}.json"),
        help="results file; default: %(default)s",
    )
    command.add_argument(
        "--root", type=Path, default=Path(), help="folder of docs/; default: this one"
    )


def _list(_: argparse.Namespace) -> int:
    for case in CASES.values():
        tags = " ".join(sorted(MODELS[case.model].tags))
        say(f"{case.name:28} {case.size:6} outputs {case.outputs:8} {tags}")
    for name, other in OTHERS.items():
        say(f"{name:28} {other[1]}")
    say("peers:")
    for peer in PEERS.values():
        say(f"{peer.name:30} {peer.description}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    quick = arguments.quick
    names = arguments.cases or (QUICK_CASES if quick else DEFAULT)
    peers = arguments.peers.split(",") if arguments.peers else QUICK if quick else None
    unknown = [name for name in names if name not in CASES and name not in OTHERS]
    if unknown:
        print(f"no case {unknown[0]!r}; see: python -m bench list", file=sys.stderr)
        return 2
    head, rows = header(arguments.seed, arguments.device), []
    for name in names:
        if name in OTHERS:
            measure, _ = OTHERS[name]
            rows += measure(arguments.device, say)
        else:
            rows += [
                row.to_dict()
                for row in run_case(
                    CASES[name],
                    device=arguments.device,
                    repeats=1 if quick else arguments.repeats,
                    seed=arguments.seed,
                    say=say,
                    peers=peers,
                    cold=not arguments.reuse_cache,
                    launches=arguments.launches,
                )
            ]
        save(arguments.out, head, rows)
    say(f"results in {arguments.out}")
    # A peer that stock PyTorch cannot run is a finding; one that memopt cannot run is a failure.
    failed = [row["peer"] for row in rows if row.get("status") == "failed"]
    return int(any(peer.startswith(("eager", "memopt")) for peer in failed))


def _coverage(arguments: argparse.Namespace) -> int:
    # Here, because it imports all of transformers.
    from bench import coverage_page
    from bench.coverage import row
    from bench.zoo.families import CAUSAL_LMS

    names = arguments.families or [family.name for family in CAUSAL_LMS]
    unknown = set(names) - {family.name for family in CAUSAL_LMS}
    if unknown:
        print(f"no family {sorted(unknown)[0]!r}", file=sys.stderr)
        return 2
    old = load(arguments.out)["rows"] if arguments.out.exists() else []
    rows = {own["family"]: own for own in old}
    # Rows come from several runs, where one was cut short or named some families.
    head = header(0, "cpu") | {"command": "python -m bench coverage"}
    for family in CAUSAL_LMS:
        if family.name in names:
            rows[family.name] = own = row(family)
            say(f"{family.name:28} {own['status']}")
            save(arguments.out, head, [rows[name] for name in sorted(rows)])
    path = arguments.root / "docs" / "coverage.md"
    path.write_text(coverage_page.page(load(arguments.out)))
    say(f"wrote {path}")
    return 0


def _scaling(arguments: argparse.Namespace) -> int:
    from bench import scaling, scaling_page

    head = header(0, "cpu") | {"command": "python -m bench scaling"}
    save(arguments.out, head, scaling.run(say))
    results, docs = load(arguments.out), arguments.root / "docs"
    picture = Path("assets") / "scaling.png"
    (docs / picture.parent).mkdir(parents=True, exist_ok=True)
    scaling_page.draw(results["rows"], docs / picture)
    path = docs / "scaling.md"
    path.write_text(scaling_page.page(results, picture.as_posix()))
    say(f"wrote {path}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    say(compare.table(arguments.before, arguments.after))
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    for path in plot.write_all(arguments.files, arguments.root):
        say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
