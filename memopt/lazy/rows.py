"""Rows of logits that were never computed: what they are made of, and how to compute them.

A head maps each row of a hidden state, ``H`` numbers, to a row of logits, ``V`` numbers, and what
is done to each row by itself can be noted and done later. So the hidden state and a function stand
for the values, at about ``H/V`` of their bytes, and any number of rows can be computed at a time.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memopt._torch import pytree
from memopt.lazy.stamps import Stamp, apart

Map = Callable[[torch.Tensor], torch.Tensor]

CHUNK_BYTES = 2**27
"""Logits that a reduction holds at a time; it may have a few temporaries of that size."""


@dataclass(frozen=True)
class Head:
    """The map from a row of the hidden state to a row of logits, as the forward had it.

    Attributes:
        weight: ``(V, H)``.
        bias: ``(V,)``, or None.
        scale: multiplies the product, before the softcap.
        softcap: ``c`` in ``c * tanh(z / c)``; 0 for none.
        dtype: of the product.
        stamps: everything that must not have changed.
        computed: told how many rows, whenever all of some rows are computed.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float
    dtype: torch.dtype
    stamps: tuple[Stamp, ...]
    computed: Callable[[int], None]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        for stamp in self.stamps:
            stamp.check()
        bias = None if self.bias is None else self.bias.to(self.dtype)
        z = F.linear(hidden.to(self.dtype), self.weight.to(self.dtype), bias)
        if self.scale != 1:
            z = z * self.scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap > 0 else z

    def columns(self, part: slice) -> "Head":
        """The map to a part of the vocabulary."""
        bias = None if self.bias is None else self.bias[part]
        return replace(self, weight=self.weight[part], bias=bias)

    def detached(self) -> "Head":
        """The same map, without the graph that its weight was computed by."""
        bias = None if self.bias is None else apart(self.bias)
        return replace(self, weight=apart(self.weight), bias=bias)


@dataclass(eq=False)
class Rows:
    """Values that are a function of rows of logits, not computed yet.

    Attributes:
        head: gives the logits.
        hidden: ``(..., H)``, its rows in the order of the values' rows.
        like: the geometry of the values, ``(..., V)``, on the meta device.
        function: from logits to the values, each row by itself.
        elementwise: whether it even takes each number by itself.
        differentiable: whether gradients flow to the hidden state and the head.
        root: the rows in whose memory eager would have these values; None for their own.
        again: makes these values from the root's.
        value: the values, once something needed them all.
        written: whether ``value`` was changed in place.
        still: the same values in the same memory without their graph, if anybody has them.
        source: the rows that these are ``still`` of, as long as something else needs them.
    """

    head: Head
    hidden: torch.Tensor
    like: torch.Tensor
    function: Map
    elementwise: bool
    differentiable: bool
    root: "Rows | None" = None
    again: Map | None = None
    value: torch.Tensor | None = field(default=None, init=False)
    written: bool = field(default=False, init=False)
    still: "Rows | None" = field(default=None, init=False)
    source: "weakref.ref[Rows] | None" = field(default=None, init=False)

    @property
    def pending(self) -> bool:
        """Whether there are no values yet, here or in the root."""
        return self.value is None and (self.root is None or self.root.value is None)

    @property
    def overwritten(self) -> bool:
        """Whether the values are no longer what ``compute`` gives."""
        return self.written or (self.root is not None and self.root.written)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What gradients flow to."""
        tensors = (self.hidden, self.head.weight, self.head.bias)
        return tuple(t for t in tensors if t is not None and t.requires_grad)

    @property
    def probe(self) -> torch.Tensor:
        """No rows of the values: what a function makes of it tells dtype and device."""
        like = self.like
        return torch.empty((0, like.shape[-1]), dtype=like.dtype, device=self.hidden.device)

    def copy(self, like: torch.Tensor, **changes: Any) -> "Rows":
        """Rows whose values have memory of their own."""
        differentiable = self.differentiable and torch.is_grad_enabled()
        changes = {"differentiable": differentiable, "root": None, "again": None, **changes}
        rows = replace(self, like=like, **changes)
        if self.differentiable and not rows.differentiable:
            rows.hidden, rows.head = apart(rows.hidden), rows.head.detached()
        return rows

    def detached(self) -> "Rows":
        """Rows with these values, in the same memory, that do not keep the graph alive."""
        if not self.differentiable:
            return self
        if self.still is None:
            root = None if self.root is None else self.root.detached()
            hidden, head = apart(self.hidden), self.head.detached()
            self.still = replace(self, hidden=hidden, head=head, root=root, differentiable=False)
            self.still.source = weakref.ref(self)
        return self.still

    def view(self, like: torch.Tensor, again: Map, **changes: Any) -> "Rows":
        """Rows whose values ``again`` makes from these values, in the same memory."""
        earlier = self.again
        path = again if earlier is None else lambda value: again(earlier(value))
        return self.copy(like, root=self.root or self, again=path, **changes)

    def then(
        self, step: Map, dtype: torch.dtype | None = None, elementwise: bool = True
    ) -> "Rows":
        """Rows with one more step."""
        first = self.function
        return self.copy(
            torch.empty_like(self.like, dtype=dtype),
            function=lambda z: step(first(z)),
            elementwise=self.elementwise and elementwise,
        )

    def aliased(self) -> "Rows":
        """The same rows of views of the inputs: gradients of these go no way round by others.

        The hidden state may depend on the weight: it does where the weight is an embedding's
        too, and a compiled model depends on all its parameters at once.
        """
        weight, bias = self.head.weight, self.head.bias
        bias = None if bias is None else bias.view_as(bias)
        head = replace(self.head, weight=weight.view_as(weight), bias=bias)
        return self.copy(self.like, hidden=self.hidden.view_as(self.hidden), head=head)

    def twin_of(self, other: "Rows") -> bool:
        """Whether both are functions of the same logits, with gradients or without."""
        if self.differentiable or other.differentiable:
            same = self.hidden is other.hidden and self.head is other.head
            return same and self.differentiable == other.differentiable
        alike = _same_memory(self.hidden, other.hidden)
        alike = alike and _same_memory(self.head.weight, other.head.weight)
        return alike and self.head.stamps is other.head.stamps

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """The values of some rows, under the ambient grad mode but not the ambient autocast."""
        with _without_autocast(hidden.device):
            return self.function(self.head(hidden))

    def settle(self, write: bool = False) -> torch.Tensor:
        """All values, computed at most once.

        Args:
            write: they are about to be changed in place, so the root must have them too.
        """
        # The graph is that of the forward's grad mode, as eager's is, whatever the reader's.
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable):
            root = self.root
            if root and self.again and (write or root.value is not None or self._is_all_of(root)):
                self.value = self.again(root.settle(write))
                self.again = None
            elif write and self.source and (source := self.source()):
                source.settle(write)  # tells these rows
            elif self.value is None:
                self.value = self.compute(self.hidden)
                self.head.computed(math.prod(self.like.shape[:-1]))
        assert self.value is not None
        self.written |= write
        if self.still is not None:
            self.still.value, self.still.written = self.value.detach(), self.written
        return self.value

    def _is_all_of(self, root: "Rows") -> bool:
        """Whether computing the root costs no more, and can serve others too."""
        same = self.differentiable == root.differentiable
        return same and self.like.numel() == root.like.numel()

    def by_chunks(self, call: Callable[..., Any], *by_row: torch.Tensor) -> Any:
        """``call`` of all values, with a chunk of logits at a time.

        With gradients, the backward computes each chunk again.

        Args:
            call: takes ``(R, V)`` values and parts of ``by_row``; gives tensors of ``R`` rows.
            by_row: tensors with the same leading dimensions as the values.
        """

        def run(hidden: torch.Tensor, *parts: torch.Tensor) -> Any:
            return call(self.compute(hidden), *parts)

        differentiable = self.differentiable and torch.is_grad_enabled()
        again = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        lead = self.like.shape[:-1]
        row_bytes = self.like.shape[-1] * self.like.dtype.itemsize
        size = max(1, CHUNK_BYTES // max(1, row_bytes))
        flat = [t.reshape(math.prod(lead), t.shape[-1]) for t in (self.hidden, *by_row)]
        with torch.set_grad_enabled(differentiable):
            calls = zip(*(torch.split(t, size) for t in flat), strict=True)
            results = [again(*parts) if differentiable else run(*parts) for parts in calls]
        return pytree.tree_map(lambda *t: torch.cat(t).reshape((*lead, *t[0].shape[1:])), *results)


def autocasts(device: torch.device) -> bool:
    """Whether the ambient autocast covers the device."""
    known = torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    place = a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
    return a is b or (place and a.shape == b.shape and a.stride() == b.stride())


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    if not autocasts(device):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
