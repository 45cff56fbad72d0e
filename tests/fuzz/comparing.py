"""Results of two runs of a model: equal, or as near to the truth as they should be."""

from typing import Any

import torch
from torch import Tensor

from tests.fuzz.cases import COMPRESSED_ERROR, Case

Results = dict[str, Any]
# Of float64, over the largest number of the tensor: two orders of a long sum, a few steps deep.
_RELATIVE = 1e-9


class DifferenceError(AssertionError):
    """Two runs have other results."""


def compare(case: Case, actual: Results, expected: Results, truth: Results) -> None:
    """Equal, or as near to the truth as eager is.

    Raises:
        DifferenceError: naming the first result that does.
    """
    if case.kind == "compressed":
        actual = _with_exact_gradients(actual, expected)
    gradients = [v for n, v in expected.items() if "gradient" in n and isinstance(v, Tensor)]
    largest = max((float(g.abs().max()) for g in gradients if g.numel()), default=0.0)
    if actual.keys() != expected.keys():
        raise DifferenceError(f"results {sorted(actual.keys() ^ expected.keys())}")
    for name, reference in expected.items():
        own = actual[name]
        if own is None and reference is None:
            continue
        if "gradient" in name and (own is None or reference is None):
            there: Tensor = own if reference is None else reference
            if there.any():
                raise DifferenceError(f"{name}: {own} where eager has {reference}")
            continue
        if not isinstance(reference, Tensor):
            if own != reference:
                raise DifferenceError(f"{name}: {own!r} where eager has {reference!r}")
            continue
        if (own.shape, own.dtype) != (reference.shape, reference.dtype):
            raise DifferenceError(
                f"{name}: {own.dtype} {[*own.shape]} where eager has {reference.dtype} "
                f"{[*reference.shape]}"
            )
        if not reference.is_floating_point():
            if not torch.equal(own, reference):
                raise DifferenceError(f"{name}: other integers")
            continue
        exact, plain, mine = truth[name].double(), reference.double(), own.double()
        floor = largest / 1000 if "gradient" in name else 1e-3
        scale = max(float(exact.abs().max()) if exact.numel() else 0.0, floor)
        wide = reference.dtype == torch.float64
        unit = 2.0**-8 if case.is_low else _RELATIVE if wide else 1e-6
        allowed = 4 * float((plain - exact).abs().max() if exact.numel() else 0) + unit * scale
        error = float((mine - exact).abs().max()) if exact.numel() else 0.0
        if not error <= allowed:
            raise DifferenceError(
                f"{name}: off by {error:.2e}, allowed {allowed:.2e}, scale {scale:.2e}"
            )


def _with_exact_gradients(actual: Results, expected: Results) -> Results:
    """The same with eager's gradients, if all together are as near as was asked for.

    Raises:
        DifferenceError: they are not.
    """
    names = [
        name
        for name, value in expected.items()
        if "gradient" in name and isinstance(value, Tensor) and actual.get(name) is not None
    ]
    if not names:
        return actual
    mine, exact = (torch.cat([r[n].double().flatten() for n in names]) for r in (actual, expected))
    error, scale = float((mine - exact).norm()), float(exact.norm())
    if not error <= COMPRESSED_ERROR * scale:
        raise DifferenceError(f"gradients off by {error:.2e}, of a norm of {scale:.2e}")
    return actual | {name: expected[name] for name in names}
