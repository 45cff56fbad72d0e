"""What was found of a machine, and of it what can be found without torch: versions."""

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from memopt._versions import TORCH, TRANSFORMERS, TRITON, Requirement, __version__
from memopt.errors import UnsupportedVersionError

State = Literal["good", "off", "fault"]
_MARKS = {"good": ("✓", "green"), "off": ("-", "yellow"), "fault": ("✗", "red")}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: ``"versions"``, ``"device"``, ``"compiler"``, ``"caches"``, ``"passes"`` or
            ``"kernels"``.
        name: of the thing.
        state: ``"good"``; ``"off"``, where memopt does without; or ``"fault"``.
        text: what was seen and, of what is off, why; of a fault also the remedy.
    """

    topic: str
    name: str
    state: State
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, to print or read."""

    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing that memopt needs is missing."""
        return all(finding.state != "fault" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain JSON types."""
        findings = [asdict(finding) for finding in self.findings]
        return {"version": __version__, "healthy": self.is_healthy, "findings": findings}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, show_header=False, pad_edge=False)
        for style in ("dim", None, None):
            table.add_column(style=style, no_wrap=True)
        table.add_column(overflow="fold", ratio=1)
        topic = ""
        for (of, state, text), names in self._alike().items():
            if topic and of != topic:
                table.add_row()
            name = names[0] if len(names) == 1 else str(len(names))
            said = text if len(names) == 1 else f"{text}: {', '.join(names)}"
            table.add_row(of if of != topic else "", Text(*_MARKS[state]), Text(name), Text(said))
            topic = of
        yield table
        faults = sum(finding.state == "fault" for finding in self.findings)
        off = sum(finding.state == "off" for finding in self.findings)
        yield Text()
        verdict = f"{faults} to repair" if faults else "nothing to repair"
        yield Text(f"{verdict}, {off} off", style="bold red" if faults else "bold")

    def _alike(self) -> dict[tuple[str, State, str], list[str]]:
        """The names of what the same is said of, by what that is."""
        alike: dict[tuple[str, State, str], list[str]] = {}
        for finding in self.findings:
            key = finding.topic, finding.state, finding.text
            alike.setdefault(key, []).append(finding.name)
        return alike


def versions() -> Iterator[Finding]:
    """Of what is installed, from its metadata alone."""
    yield Finding("versions", "memopt", "good", __version__)
    yield Finding("versions", "python", "good", platform.python_version())
    yield _version(TORCH, "")
    yield _version(TRITON, "kernels run as PyTorch code")
    yield _version(TRANSFORMERS, "memopt.cache is of no use", optional=True)


def _version(requirement: Requirement, without: str, *, optional: bool = False) -> Finding:
    """A dependency; ``without`` says what comes of its absence, where memopt can do without."""
    name, seen = requirement.name, requirement.installed
    if seen is None and (optional or requirement.optional):
        pip = f"pip install '{name}{requirement.specifier}'"
        return Finding("versions", name, "off", f"not installed: {without}; {pip}")
    try:
        requirement.check()
    except UnsupportedVersionError as error:
        return Finding("versions", name, "off" if optional else "fault", str(error))
    return Finding("versions", name, "good", f"{seen}, supported is {requirement.specifier}")


def without_torch(error: Exception) -> Diagnosis:
    """What there is to say where torch is missing, of another version, or broken."""
    found = [*versions()]
    if all(finding.state != "fault" for finding in found):
        remedy = f"install it anew: pip install --force-reinstall 'torch{TORCH.specifier}'"
        text = f"torch cannot be imported: {error}; {remedy}"
        found.append(Finding("versions", "import", "fault", text))
    text = "not looked at: they need torch as it is supported"
    rest = ("device", "compiler", "caches", "passes", "kernels")
    return Diagnosis((*found, *(Finding(topic, "all", "off", text) for topic in rest)))
