"""The operators: one file each; what defines their numbers is in `tests/references.py`.

Import them as ``memopt.kernels``. The folder is called ``kernels`` only in the source tree.
"""

if __name__ != "memopt.kernels":
    raise ImportError(f"import memopt.kernels, not {__name__}: it would be loaded a second time")

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memopt.kernels.spec import KernelSpec

_FORMS = ("", "_rows", "_rows_backward", "_weighted")
_CROSS_ENTROPIES = [f"memopt.linear_cross_entropy{form}" for form in (*_FORMS, "_kept")]
_DIVERGENCES = [f"memopt.linear_divergence{form}" for form in _FORMS]


@functools.cache
def scratch_table() -> Mapping[str, Callable[..., int]]:
    """What each operator allocates besides its results, in bytes, from its arguments."""
    from memopt.kernels import (
        contrastive,
        divergence,
        embedding_gradient,
        gated,
        gated_packed,
        linear_cross_entropy,
        norm,
        rotary,
    )

    return {
        **dict.fromkeys(_CROSS_ENTROPIES, linear_cross_entropy.scratch_bytes),
        "memopt.linear_cross_entropy_": linear_cross_entropy.scratch_bytes,
        **dict.fromkeys(_DIVERGENCES, divergence.scratch_bytes),
        "memopt.contrastive": contrastive.scratch_bytes,
        "memopt.embedding_gradient": embedding_gradient.scratch_bytes,
        "memopt.embedding_rows": embedding_gradient.rows_scratch_bytes,
        "memopt.gated": gated.scratch_bytes,
        "memopt.gated_backward": gated.backward_scratch_bytes,
        "memopt.gated_packed": gated_packed.scratch_bytes,
        "memopt.gated_packed_backward": gated_packed.backward_scratch_bytes,
        "memopt.norm": norm.scratch_bytes,
        "memopt.norm_backward": norm.backward_scratch_bytes,
        **dict.fromkeys(("memopt.rotary", "memopt.rotary_"), rotary.scratch_bytes),
    }


@functools.cache
def specs() -> tuple["KernelSpec", ...]:
    """What every kernel that is one operator states of itself."""
    from memopt.kernels import gated, gated_packed, norm, rotary

    modules = (gated, gated_packed, norm)
    both = (spec for module in modules for spec in (module.SPEC, module.BACKWARD_SPEC))
    return *both, rotary.SPEC


@functools.cache
def cut_table() -> Mapping[str, Callable[..., bool]]:
    """Which operators take 0 for ``chunk_rows``, no logits in memory, and with which arguments."""
    from memopt.kernels import linear_cross_entropy

    return dict.fromkeys(_CROSS_ENTROPIES, linear_cross_entropy.can_be_cut)
