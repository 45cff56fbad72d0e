"""The one place that says which versions memopt is, and which of torch and Triton it runs on."""

import re
from dataclasses import dataclass
from importlib import metadata

from memopt.errors import UnsupportedVersionError

__version__ = "0.1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A range of minor versions of one dependency.

    Attributes:
        name: what people call it; also what ``pip install`` takes.
        distributions: the names it is published under; the first one installed counts.
        oldest: the first supported ``(major, minor)``.
        newest: the last supported ``(major, minor)``.
        optional: whether memopt works without it.
    """

    name: str
    distributions: tuple[str, ...]
    oldest: tuple[int, int]
    newest: tuple[int, int]
    optional: bool = False

    @property
    def specifier(self) -> str:
        """The range as pip writes it: ``">=2.11,<2.14"``."""
        (major, minor), (last_major, last_minor) = self.oldest, self.newest
        return f">={major}.{minor},<{last_major}.{last_minor + 1}"

    @property
    def installed(self) -> str | None:
        """The installed version, from the metadata of the distribution; None if there is none."""
        return _installed(self.distributions)

    def check(self) -> None:
        """Compare the installed distribution with the range, from its metadata alone.

        Raises:
            UnsupportedVersionError: it is outside the range, or missing and not optional.
        """
        seen = self.installed
        if seen is None and self.optional:
            return
        if seen is not None and self.oldest <= _minor(seen) <= self.newest:
            return
        found = f"{self.name} {seen} is installed" if seen else f"{self.name} is not installed"
        supported = " to ".join(f"{major}.{minor}" for major, minor in (self.oldest, self.newest))
        raise UnsupportedVersionError(
            f"{found}, but memopt {__version__} supports {self.name} {supported}; "
            f"run: pip install '{self.name}{self.specifier}'"
        )


TORCH = Requirement(name="torch", distributions=("torch",), oldest=(2, 11), newest=(2, 13))
TRITON = Requirement(
    name="triton",
    distributions=("triton", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm"),
    oldest=(3, 6),
    newest=(3, 9),
    optional=True,  # builds of torch for the CPU come without it
)
TRANSFORMERS = Requirement(  # checked where ``memopt.cache`` is imported, and only there
    name="transformers", distributions=("transformers",), oldest=(5, 24), newest=(5, 99)
)


def check() -> None:
    """Refuse to run on an untested torch or Triton.

    Neither package is imported.

    Raises:
        UnsupportedVersionError: with what is installed, what is supported and the pip command.
    """
    for requirement in (TORCH, TRITON):
        requirement.check()


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _minor(version: str) -> tuple[int, int]:
    """``(2, 13)`` of ``"2.13.0a0+git1234"``; ``(0, 0)``, in no range, where it is unreadable."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
