"""Other libraries' linear layer and cross-entropy in one, and where each of them runs."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean cross-entropy of hidden states `(N, H)`, a weight `(V, H)` and classes `(N,)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A library that computes a head and its loss together.

    Attributes:
        distribution: what pip installs.
        module: what is imported.
        load: imports it and gives the function.
        traced: whether torch.compile takes the function into its graph.
        devices: where it runs.
        interpreted_on: where it runs as Triton kernels in the interpreter of `bench.triton`: the
            bytes that it allocates are right there, and times say nothing.
    """

    distribution: str
    module: str
    load: Callable[[], Loss]
    traced: bool = False
    devices: tuple[str, ...] = ("cuda",)
    interpreted_on: tuple[str, ...] = ()

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on this kind of device here, or None if it can."""
        if device not in (*self.devices, *self.interpreted_on):
            return f"{self.distribution} runs on {' and '.join(self.devices)} only"
        needed = (self.module, "triton") if device in self.interpreted_on else (self.module,)
        for module in needed:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed; run: pip install 'memopt[bench]'"
        return None

    def loss(self, device: str) -> Loss:
        """The function, ready for tensors on this kind of device."""
        if device in self.interpreted_on:
            from bench.triton.interpreter import install

            install()
        return self.load()


def _torch() -> Loss:
    """Torch's by chunks; without options it makes the logits whole."""
    from torch.nn import LinearCrossEntropyOptions  # type: ignore[attr-defined, unused-ignore]

    function = F.linear_cross_entropy  # type: ignore[attr-defined, unused-ignore]

    def loss(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        options = LinearCrossEntropyOptions(allow_retain_graph=True)  # it must be, compiled
        return function(rows, weight, targets, options=options)

    return loss


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy  # type: ignore[no-any-return, unused-ignore]


def _cut() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy  # type: ignore[no-any-return, unused-ignore]


LIBRARIES: Mapping[str, Library] = {
    "torch": Library(
        distribution="torch", module="torch", load=_torch, traced=True, devices=("cpu", "cuda")
    ),
    "liger": Library(
        distribution="liger-kernel", module="liger_kernel", load=_liger, interpreted_on=("cpu",)
    ),
    "cut": Library(distribution="cut-cross-entropy", module="cut_cross_entropy", load=_cut),
}
