"""Rows of logits that were never computed: what they are made of, and how to compute them.

A head maps each row of a hidden state, ``H`` numbers, to a row of logits, ``V`` numbers, and what
is done to each row by itself can be noted and done later. So the hidden state and a function stand
for the values, at about ``H/V`` of their bytes, and any number of rows can be computed at a time.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memopt._torch import pytree
from memopt.errors import StaleLogitsError

Map = Callable[[torch.Tensor], torch.Tensor]

CHUNK_BYTES = 2**27
"""Logits that a reduction holds at a time; it may have a few temporaries of that size."""


@dataclass(frozen=True)
class Stamp:
    """A tensor as it was at the forward.

    Attributes:
        name: what it is, for the error.
        tensor: the tensor.
        state: changes with every write that autograd knows of, and with the memory.
        sample: a few of its numbers: fused optimizers and ``.data`` write unseen by autograd.
    """

    name: str
    tensor: torch.Tensor
    state: tuple[int, int]
    sample: torch.Tensor

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "Stamp":
        return cls(name, tensor, _state(tensor), _sample(tensor))

    def check(self) -> None:
        """Raise if the tensor is not what it was.

        Raises:
            StaleLogitsError: it was changed in place, moved or freed.
        """
        same = _state(self.tensor) == self.state
        if not (same and torch.equal(_sample(self.tensor), self.sample)):
            raise StaleLogitsError(
                f"the logits were not kept and cannot be computed any more: {self.name} was "
                "changed in place, moved or freed since the forward. Read the logits before "
                "optimizer.step(), or have them kept with "
                'options={"passes": {"chunk_losses": {"logits": "keep"}}}'
            )


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to 16 rows and 16 columns of the first matrix, as bytes: so that NaN equals itself.

    On the CPU they lie in memory that is not the allocator's: the planner promises its bytes.
    """
    steps = [slice(None, None, max(1, -(-size // 16))) for size in tensor.shape[-2:]]
    first = [slice(1)] * (tensor.ndim - len(steps))
    with torch.no_grad():
        picked = tensor[tuple(first + steps)].clone(memory_format=torch.contiguous_format)
        taken = picked.view(torch.uint8)
        if taken.device.type != "cpu" or not taken.numel():
            return taken
        return torch.frombuffer(bytearray(taken.numpy().tobytes()), dtype=torch.uint8)


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
        return replace(self, like=like, **changes)

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
        same = self.hidden is other.hidden and self.head is other.head
        return same and self.differentiable == other.differentiable

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
            elif self.value is None:
                self.value = self.compute(self.hidden)
                self.head.computed(math.prod(self.like.shape[:-1]))
        self.written |= write
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


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    if not autocasts(device):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
