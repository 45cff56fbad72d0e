"""Rows of logits for the row kernel, and the eager rows that it replaces on a GPU.

From the import on, Triton's kernels are interpreted where tensors are on the CPU.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.interpreter import install
from memopt.kernels import chunks, triton_rows
from memopt.kernels.chunks import run_rows
from memopt.kernels.head import Head
from memopt.kernels.rows import IndexTargets

install()
Tensor = torch.Tensor
OPTIONS: list[dict[str, Any]] = [
    {},
    {"smoothing": 0.2},
    {"smoothing": 1.0},
    {"weighted": True},
    {"weighted": True, "smoothing": 0.2},
    {"scale": 0.3, "softcap": 2.0},
    {"scale": -1.5, "weighted": True, "normaliser": True},
    {"softcap": 5.0, "weighted": True, "smoothing": 0.1, "normaliser": True},
    {"trained": False},
    {"trained": False, "weighted": True, "smoothing": 0.1, "softcap": 5.0},
]


@dataclass(frozen=True)
class Rows:
    """Products of a chunk, and what becomes of them."""

    raw: Tensor
    loss: IndexTargets
    scale: float = 1.0
    softcap: float = 0.0
    g: Tensor | None = None
    h: Tensor | None = None

    @classmethod
    def draw(
        cls,
        rows: int = 16,
        classes: int = 1031,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        weighted: bool = False,
        smoothing: float = 0.0,
        trained: bool = True,
        normaliser: bool = False,
        **options: Any,
    ) -> "Rows":
        weight = torch.rand(classes, device=device) if weighted else None
        target = torch.randint(classes, (rows,), device=device)
        g, h = (torch.randn(rows, device=device) if on else None for on in (trained, normaliser))
        raw = (3 * torch.randn(rows, classes, device=device)).to(dtype)
        return cls(raw, IndexTargets(target, weight, smoothing), g=g, h=h, **options)

    @property
    def double(self) -> "Rows":
        weight = self.loss.weight_V
        loss = replace(self.loss, weight_V=None if weight is None else weight.double())
        g, h = (None if t is None else t.double() for t in (self.g, self.h))
        return replace(self, raw=self.raw.double(), loss=loss, g=g, h=h)

    def kernel(self) -> list[Tensor]:
        """Values, log-sum-exps and, where there is an upstream one, gradients."""
        raw = self.raw.clone()
        result = triton_rows.run(raw, self.loss, self.scale, self.softcap, self.g, self.h)
        return [*result, raw] if self.g is not None else [*result]

    def eager(self) -> list[Tensor]:
        raw = self.raw.clone()
        layer = Head(raw, raw, None, self.scale, self.softcap)
        every = slice(0, len(raw))
        result = eager_rows(layer, self.loss, raw, every, self.g, self.h)
        return [*result, raw] if self.g is not None else [*result]


def eager_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``run_rows`` without the kernel, also where it could run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "has_row_kernel", lambda loss, x: False)
        return run_rows(*arguments)
