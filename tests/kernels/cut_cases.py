"""Heads, targets and upstream gradients for the cross-entropy without logits in memory.

From the import on, Triton's kernels are interpreted where tensors are on the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.interpreter import install
from memopt.kernels import chunks
from memopt.kernels import cut_cross_entropy as cut
from memopt.kernels.chunks import run_chunks
from memopt.kernels.head import Head
from memopt.kernels.linear_cross_entropy import Arguments
from memopt.kernels.rows import IndexTargets
from tests.references import assert_draws_within_reference_error

install()
Tensor = torch.Tensor
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "smoothing": 0.2},
    {"smoothing": 1.0},
    {"weighted": True},
    {"bias": True, "weighted": True, "smoothing": 0.2, "scale": -1.5},
    {"bias": True, "scale": 0.3, "softcap": 2.0},
    {"weighted": True, "smoothing": 0.1, "softcap": 5.0, "normaliser": True},
    {"trained": False, "weighted": True, "smoothing": 0.1, "softcap": 5.0},
]
# Every option at once, with rows that do not count.
FULL: dict[str, Any] = {
    "bias": True,
    "weighted": True,
    "smoothing": 0.1,
    "softcap": 5.0,
    "normaliser": True,
}


@dataclass(frozen=True)
class Case:
    """A head, its targets and what comes from above."""

    layer: Head
    loss: IndexTargets
    g: Tensor | None
    h: Tensor | None
    wanted: tuple[bool, bool, bool]

    @classmethod
    def draw(
        cls,
        rows: int = 100,
        width: int = 48,
        classes: int = 200,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        bias: bool = False,
        weighted: bool = False,
        smoothing: float = 0.0,
        normaliser: bool = False,
        trained: bool = True,
        **factors: float,
    ) -> "Case":
        x = torch.randn(rows, width, device=device).to(dtype)
        weight = (0.3 * torch.randn(classes, width, device=device)).to(dtype)
        layer = Head(
            x, weight, torch.randn(classes, device=device).to(dtype) if bias else None, **factors
        )
        target = torch.randint(classes, (rows,), device=device)
        class_weight = torch.rand(classes, device=device) if weighted else None
        g, h = (torch.randn(rows, device=device) if on else None for on in (trained, normaliser))
        if g is not None:
            g[::5] = 0
        loss = IndexTargets(target, class_weight, smoothing)
        return cls(layer, loss, g, h, (trained, trained, trained and bias))

    @property
    def double(self) -> "Case":
        x, weight, bias, class_weight, g, h = (
            None if t is None else t.double()
            for t in (
                self.layer.x_NH, self.layer.weight_VH, self.layer.bias_V, self.loss.weight_V,
                self.g, self.h,
            )
        )  # fmt: skip
        assert x is not None
        assert weight is not None
        layer = replace(self.layer, x_NH=x, weight_VH=weight, bias_V=bias)
        return replace(self, layer=layer, loss=replace(self.loss, weight_V=class_weight), g=g, h=h)

    def cut(self, **options: Any) -> list[Tensor]:
        """Values, log-sum-exps and gradients by tiles."""
        return self._flat(cut.run(self.layer, self.loss, self.wanted, self.g, self.h, **options))

    def chunked(self) -> list[Tensor]:
        """The same by chunks, in eager code."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "has_row_kernel", lambda loss, x: False)
            return self._flat(run_chunks(self.layer, self.loss, 64, self.wanted, self.g, self.h))

    def _flat(self, results: tuple[Tensor, Tensor, Sequence[Tensor]]) -> list[Tensor]:
        values, lse, gradients = results
        made = [g for g, on in zip(gradients, self.wanted, strict=True) if on]
        assert all(not g.numel() for g, on in zip(gradients, self.wanted, strict=True) if not on)
        return [values, lse, *made]


def arguments(case: Case, **changes: Any) -> Arguments:
    """What the operators take for the case."""
    layer = case.layer
    made = Arguments(
        layer.x_NH, layer.weight_VH, layer.bias_V, case.loss.target_N, case.loss.weight_V, -100,
        case.loss.smoothing, layer.scale, layer.softcap, 0, case.wanted,
    )  # fmt: skip
    return made._replace(**changes)


def assert_near_float64(draw: Callable[[], Case], draws: int = 3, **options: Any) -> None:
    """By tiles as near as by chunks, over several draws."""

    def results() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        case = draw()
        return case.cut(**options), case.double.chunked(), case.chunked()

    assert_draws_within_reference_error(results, draws)
