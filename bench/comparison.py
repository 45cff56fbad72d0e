"""The figures of ``docs/comparison.md``: memopt and what else there is, in the same run."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bench.compare import step_rows
from bench.tables import markdown, short_line

Results = dict[str, Any]
# By subject: the peers whose runs have something to say about it.
SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "losses": (
        "inductor auto-chunker", "inductor linear_cross_entropy", "inductor+liger",
        "inductor+cut_cross_entropy",
    ),
    "checkpoints": (
        "inductor+checkpoint", "inductor+selective checkpoint", "inductor 0.5", "inductor 0.3",
        "inductor 0.1", "inductor 0",
    ),
    "norms": ("inductor folded norms",),
    "tiles": ("eager+tiles",),
}  # fmt: skip
_MARKED = re.compile(r"<!-- bench:(\w+) -->.*?<!-- bench:end -->", re.S)
_COLUMNS = ("case", "peer", "peak MiB", "peak / Inductor", "step / Inductor", "gradient error")


def fill(page: str, files: Iterable[tuple[str, Results]]) -> str:
    """A page with the table of each subject between its markers.

    Args:
        page: with ``<!-- bench:losses -->`` and ``<!-- bench:end -->`` around a table.
        files: results by the name of their section on the page of results; of a case that was
            measured more than once with the same kind of peer, the last one counts.

    Raises:
        KeyError: there is no such subject.
    """
    loaded = list(files)

    def table(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- bench:{name} -->\n\n{_table(SUBJECTS[name], loaded)}\n<!-- bench:end -->"

    return _MARKED.sub(table, page)


def _table(peers: tuple[str, ...], files: list[tuple[str, Results]]) -> str:
    """Every peer of the runs that one of these took part in, and the runs."""
    runs = dict[str, tuple[str, Results]]()
    for stem, results in files:
        for case, peer in step_rows(results):
            if peer in peers:
                runs[case] = stem, results
    lines = []
    for case, (_, results) in runs.items():
        rows = step_rows(results)
        lines += [short_line(rows, key) for key in rows if key[0] == case]
    stems = dict.fromkeys(stem for stem, _ in runs.values())
    links = ", ".join(f"[{stem}](results.md#{stem})" for stem in stems)
    return f"{markdown(_COLUMNS, lines)}\nFrom {links}.\n"
