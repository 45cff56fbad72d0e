"""What a kernel states of itself: one gate holds every kernel to it.

A kernel is an operator with two implementations of the same arguments and results. ``plain`` is
PyTorch code: it defines the numbers, is exact in float64, and runs where Triton does not.
``launch`` is Triton code, which runs on a GPU. Both compute in float32 or wider, and round once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.serving import serves

Results = tuple[Tensor, ...]
Arguments = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel.

    Attributes:
        name: of the operator, with its namespace: ``"memopt::norm"``.
        plain: the operator in PyTorch code. Results that are left out have no entries.
        launch: the operator in Triton code, on the current device.
        scratch: bytes that the operator allocates at most besides its results, from its
            arguments, fake or real.
        samples: arguments to try for a dtype, on the CPU, the usual ones first; sizes that fit
            no block, strides and left-out arguments among them.
        large: arguments like the usual ones, of a size that is worth timing on a GPU; None where
            the samples are.
        dram_share: bytes to and from memory over those of every input read once and every result
            written once: above 1 where several launches read the same.
        l2_share: sectors that programs move to and from the shared cache, over those that move
            to and from memory: above 1 where several programs read the same.
        source: the paper or system that the kernel comes from.
    """

    name: str
    plain: Callable[..., Results]
    launch: Callable[..., Results]
    scratch: Callable[..., int]
    samples: Callable[[torch.dtype], Iterable[Arguments]]
    large: Callable[[torch.dtype], Iterable[Arguments]] | None = None
    dram_share: float = 1.0
    l2_share: float = 1.0
    source: str

    def __call__(self, *args: Any) -> Results:
        """Run the implementation that serves where the first argument is."""
        if not serves(args[0]):
            return self.plain(*args)
        with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
            return self.launch(*args)

    @property
    def operator(self) -> Any:
        """The operator, as a graph has it."""
        namespace, name = self.name.split("::")
        return getattr(getattr(torch.ops, namespace), name).default

    def implement(self) -> None:
        """Make this the operator's implementation on every device."""

        def only(*args: Any) -> Tensor:
            return self(*args)[0]

        single = len(self.operator._schema.returns) == 1
        torch.library.impl(self.name, "default", only if single else self.__call__)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    """A sample's numbers."""
    return torch.randn(shape).to(dtype)
