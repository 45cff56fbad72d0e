"""How kernels are interpreted at the moment, and who watches."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]
Access = Literal["load", "store", "atomic"]


class Observer(Protocol):
    """What is told about a launch while it runs."""

    def begin(self, kernel: Any, arguments: Mapping[str, Any]) -> None:
        """A launch of a jitted function with these arguments and options starts."""

    def program(self, index: int) -> None:
        """The program of this number, counted from 0 in the order of the grid, starts."""

    def access(self, kind: Access, addresses: Array, itemsize: int) -> None:
        """One instruction of the program touches these addresses, masked lanes left out."""

    def barrier(self) -> None:
        """The threads of the program wait for one another."""

    def end(self) -> None:
        """The launch is over; not called where it raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How kernels are interpreted.

    Attributes:
        config: which configuration of an autotuned kernel runs, by its number.
        order: seed of the order of a launch's programs; None for that of the grid.
        observer: told about every launch.
    """

    config: int = 0
    order: int | None = None
    observer: Observer | None = None


MODE: ContextVar[Mode] = ContextVar("mode", default=Mode())  # noqa: B039 - it is frozen


@contextlib.contextmanager
def interpreting(**changes: Any) -> Iterator[None]:
    """Within it, launches run in the current mode with these fields of `Mode` changed."""
    token = MODE.set(dataclasses.replace(MODE.get(), **changes))
    try:
        yield
    finally:
        MODE.reset(token)
