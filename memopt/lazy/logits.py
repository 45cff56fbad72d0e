"""Logits that are not there: a tensor with the shape, dtype and device of a head's output.

A chunked loss never holds all logits, but a language model returns them. Most callers do not look;
those that do mostly want an argmax or an entropy. So the model returns ``LazyLogits``, which keeps
the head's input instead. Metadata, views of rows, casts and reductions over the vocabulary hold no
logits whole (``lazy_rules``). Any other use computes them, once, with the values and gradients of
eager, and is from then on the use of an ordinary tensor.

It pays as long as few steps read the logits whole. One that does computes the head's product once
more, the fourth beside the three of a training step.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from memopt._torch import pytree, refuse_data_access
from memopt.lazy.rows import Head, Rows, autocasts
from memopt.lazy.rules import apply_rule, spelled
from memopt.lazy.stamps import Stamp

PATIENCE_STEPS = 3


@dataclass
class Usage:
    """How often one model's logits are computed after all: one object, handed to each forward.

    Attributes:
        steps: forwards so far.
        materialised: how many of the latest, in a row, had most of their logits computed.
    """

    steps: int = 0
    materialised: int = 0
    _counted: int = field(default=0, repr=False)
    _warned: bool = field(default=False, repr=False)

    def forward(self) -> int:
        """Count a forward; returns its number."""
        self.steps += 1
        return self.steps

    def read(self, step: int) -> bool:
        """Count a forward whose logits were computed; returns whether to warn, which is once."""
        if step != self._counted:
            self.materialised = self.materialised + 1 if step == self._counted + 1 else 1
            self._counted = step
        due = self.materialised >= PATIENCE_STEPS and not self._warned
        self._warned |= due
        return due

    def watch(self, rows: int) -> Callable[[int], None]:
        """Count a forward of ``rows`` rows; returns what to call with the number computed."""
        step = self.forward()

        def computed(some: int) -> None:
            if 2 * some > rows and self.read(step):
                warnings.warn(
                    f"the logits were computed whole in each of the last {PATIENCE_STEPS} steps. "
                    "The chunked loss does not keep them, so that is one head product in addition "
                    "to the three of a training step. If every step needs them, set "
                    'options={"passes": {"chunk_losses": {"logits": "keep"}}} for a copy without '
                    'gradient, or "full" to leave the loss as it is.',
                    stacklevel=2,
                )

        return computed


class LazyLogits(torch.Tensor):
    """The output of a language model's head, computed on first use.

    Args:
        hidden: ``(..., H)``, the head's input.
        weight: ``(V, H)``.
        bias: ``(V,)``, or None.
        scale: multiplies the product, before the softcap.
        softcap: ``c`` in ``c * tanh(z / c)``; 0 for none.
        dtype: of the logits; by default that of the product.
        product_dtype: by default the ambient autocast's, else that of ``hidden``.
        usage: counts the forwards whose logits were computed after all, and warns once.
    """

    _rows: Rows

    def __new__(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
        dtype: torch.dtype | None = None,
        product_dtype: torch.dtype | None = None,
        usage: Usage | None = None,
    ) -> "LazyLogits":
        if product_dtype is None:
            casts = autocasts(hidden.device) and hidden.dtype != torch.float64
            kind = hidden.device.type
            product_dtype = torch.get_autocast_dtype(kind) if casts else hidden.dtype
        named = {"the hidden state": hidden, "the head's weight": weight, "the head's bias": bias}
        head = Head(
            weight=weight,
            bias=bias,
            scale=scale,
            softcap=softcap,
            dtype=product_dtype,
            stamps=tuple(Stamp.of(name, t) for name, t in named.items() if t is not None),
            computed=(usage or Usage()).watch(math.prod(hidden.shape[:-1])),
        )
        to = dtype or product_dtype
        rows = Rows(
            head=head,
            hidden=hidden,
            like=torch.empty(*hidden.shape[:-1], weight.shape[0], dtype=to, device="meta"),
            function=lambda z: z.to(to),
            elementwise=True,
            differentiable=True,
        )
        trained = torch.is_grad_enabled() and bool(rows.inputs)
        return cls._of(rows if trained else rows.detached())

    @classmethod
    def _of(cls, rows: Rows) -> "LazyLogits":
        """The tensor that stands for some rows, tied to the graph where there is one."""
        if not rows.differentiable:
            return cls._unattached(rows)
        lazy: LazyLogits = _Attach.apply(rows, *rows.inputs)  # type: ignore[no-untyped-call]
        return lazy

    @classmethod
    def _unattached(cls, rows: Rows) -> "LazyLogits":
        like = rows.like
        lazy = cls._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=rows.hidden.device,
        )
        refuse_data_access(lazy)  # an error where C++ would read the null pointer
        lazy._rows = rows
        return lazy

    def materialise(self) -> torch.Tensor:
        """The values as an ordinary tensor.

        Raises:
            StaleLogitsError: the weight, the bias or the hidden state was changed in place first.
        """
        if torch.is_grad_enabled() and self._has_own_gradient:
            copy: torch.Tensor = _plainly(torch.Tensor.clone, self)
            return copy
        return self._rows.settle()

    @property
    def _has_own_gradient(self) -> bool:
        """Whether its gradient must exist: it has hooks, or a custom function returned it."""
        if _plainly(_getter("_backward_hooks"), self) or _plainly(_getter("retains_grad"), self):
            return True
        node = _plainly(_getter("grad_fn"), self)
        if node is None:
            return bool(_plainly(_getter("requires_grad"), self))
        return getattr(node, "rows", None) is not self._rows

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rows = self._rows
        if not rows.pending:
            return repr(rows.settle())
        return (
            f"LazyLogits(shape={tuple(rows.like.shape)}, dtype={rows.like.dtype}, "
            f"device={rows.hidden.device}, not computed; .materialise() gives the values)"
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.unbind(0))

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], LazyLogits) else None
        if first is not None and first._rows.value is None and func in METADATA:
            return _plainly(func, *args, **kwargs)
        if torch.is_grad_enabled() and any(
            isinstance(leaf, LazyLogits) and leaf._has_own_gradient
            for leaf in pytree.tree_leaves((args, kwargs))
        ):
            return _plainly(func, *args, **kwargs)
        if first is not None and first._rows.pending:
            rest = pytree.tree_map_only(LazyLogits, lambda x: x._rows, (args[1:], kwargs))
            answer = apply_rule(first._rows, func, *rest)
            if answer is first._rows:
                return first
            if answer is not NotImplemented:
                return pytree.tree_map_only(Rows, cls._of, answer)
        if first is not None and _writes(func, kwargs):
            first._rows.settle(write=True)
        values = pytree.tree_map_only(LazyLogits, lambda x: x._rows.settle(), (args, kwargs))
        return func(*values[0], **values[1])

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Whatever goes past ``__torch_function__``; autograd is above, see ``_Attach``."""

        def below_autograd(lazy: LazyLogits) -> torch.Tensor:
            return lazy._rows.settle(write=func._schema.is_mutable).detach()

        args, kwargs = pytree.tree_map_only(LazyLogits, below_autograd, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Attach(torch.autograd.Function):
    """Gradients for callers in C++, which see a tensor with a ``grad_fn`` and not its values."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, *inputs: torch.Tensor) -> LazyLogits:
        ctx.rows = rows
        return LazyLogits._unattached(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows: Rows = ctx.rows
        if rows.overwritten:
            raise RuntimeError(
                "the logits were changed in place, and then used by code that bypasses Python: "
                "their gradient is lost. Change a clone() instead, or leave the loss alone with "
                'options={"passes": {"chunk_losses": {"logits": "full"}}}'
            )
        with torch.enable_grad():
            own = rows.aliased()
            value = own.compute(own.hidden)
        return None, *torch.autograd.grad(
            value, own.inputs, gradients, create_graph=torch.is_grad_enabled(), allow_unused=True
        )


def _plainly(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call without ``__torch_function__``."""
    return torch.Tensor.__torch_function__(func, (), args, kwargs)  # type: ignore[no-untyped-call]


def _getter(name: str) -> Any:
    """What ``__torch_function__`` is called with when an attribute is read."""
    return getattr(torch.Tensor, name).__get__


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call changes its first argument in place."""
    name = getattr(func, "__name__", "")
    named = name in ("__setitem__", "__set__") or (name[-1:] == "_" and name[-2:] != "__")
    return named or bool(kwargs.get("inplace"))


METADATA = {
    _getter(name)
    for name in (
        "shape dtype device layout ndim itemsize nbytes requires_grad is_leaf grad_fn grad "
        "output_nr retains_grad is_cpu is_cuda is_meta is_mps is_xpu is_sparse is_sparse_csr "
        "is_quantized is_mkldnn is_nested _version"
    ).split()
} | set(
    spelled(
        "size dim ndimension numel nelement __len__ __format__ stride storage_offset "
        "element_size get_device is_floating_point is_complex is_signed is_contiguous "
        "is_inference is_conj is_neg register_hook retain_grad"
    )
)
"""What needs no values."""
