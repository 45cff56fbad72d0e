"""What a layer's heads are held in: a store takes new tokens in, and attends over what it holds.

Legend: as in `memopt.cache.rows`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """New columns, as every store of a layer needs to know them.

    Attributes:
        columns: `(n,)`, their places.
        first: the first of them, where that is known without asking the device; else None, which
            is so in compiled code.
        positions: `(B, n)`, how many of a sequence's tokens lie before each; without meaning in
            columns of padding.
        past: `(B,)`, tokens of each sequence before these.
        real: `(B, n)`, False in columns of padding; None where there are none.
        padding: `(B, N)`, the same of all columns.
    """

    columns: Tensor
    first: int | None
    positions: Tensor
    past: Tensor
    real: Tensor | None
    padding: Tensor | None

    @property
    def stop(self) -> int | None:
        """The columns so far with these, where that is known."""
        return None if self.first is None else self.first + len(self.columns)


class Store:
    """What holds the keys and values of some heads, and attends over them.

    A subclass names in ``BATCHED`` its tensors whose first dimension is the batch, and in
    ``SHARED`` those without one.
    """

    BATCHED: ClassVar[tuple[str, ...]] = ("keys", "values")
    SHARED: ClassVar[tuple[str, ...]] = ()
    compileable: ClassVar[bool] = True

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Make room, on the device and in the dtype of the first keys and values."""
        raise NotImplementedError

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Take new keys and values in, and give the attention of the new queries."""
        raise NotImplementedError

    def bytes_for(self, batch: int, heads: int, widths: tuple[int, int], itemsize: int) -> int:
        """Bytes on the device, by formula: ``widths`` are those of a key and of a value."""
        raise NotImplementedError

    @property
    def shared(self) -> Any:
        """What it shares with stores of other layers, with a ``bytes_for`` of its own, or None."""
        return None

    def tensors(self) -> list[Tensor]:
        """All that it holds on the device."""
        return [
            getattr(part, name) for part in self.parts() for name in (*part.BATCHED, *part.SHARED)
        ]

    def parts(self) -> list[Any]:
        """Itself, and what holds tensors for it, with ``BATCHED`` and ``SHARED`` of its own."""
        return [self]

    def reset(self) -> None:
        """Forget all tokens, and keep the room.

        It is zeros, as NaN of an earlier sequence would be seen through any mask.
        """
        for held in self.tensors():
            held.zero_()

    def reorder(self, rows: Tensor) -> None:
        """Have row `i` hold what row `rows[i]` held, in the same memory."""
        for part in self.parts():
            for name in part.BATCHED:
                held = getattr(part, name)
                held.copy_(held.index_select(0, rows.to(held.device)))

    def replace_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold another batch, made of this one."""
        for part in self.parts():
            for name in part.BATCHED:
                setattr(part, name, change(getattr(part, name)))
