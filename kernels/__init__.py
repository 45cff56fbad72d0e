"""The operators: one file each; what defines their numbers is in `tests/references.py`.

Import them as ``memopt.kernels``. The folder is called ``kernels`` only in the source tree, and
there transformers takes it for the Hugging Face package of that name when it asks what is
installed: under that name it has no version, which is answer enough, and nothing in it.
"""

if __name__ != "memopt.kernels":
    __path__ = []  # operators are registered once

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
    """What each operator allocates besides its results, in bytes, from its arguments.

    A kernel says so in its spec; those that are several operators in one are listed here.
    """
    from memopt.kernels import (
        compressed,
        contrastive,
        divergence,
        embedding_gradient,
        linear_cross_entropy,
    )

    stated = {spec.name.replace("::", "."): spec.scratch for spec in specs()}
    return {
        **stated,
        "memopt.rotary_": stated["memopt.rotary"],
        **dict.fromkeys(_CROSS_ENTROPIES, linear_cross_entropy.scratch_bytes),
        "memopt.linear_cross_entropy_": linear_cross_entropy.scratch_bytes,
        **dict.fromkeys(_DIVERGENCES, divergence.scratch_bytes),
        "memopt.compress": compressed.compress_scratch,
        "memopt.decompress": compressed.decompress_scratch,
        "memopt.contrastive": contrastive.scratch_bytes,
        "memopt.embedding_gradient": embedding_gradient.scratch_bytes,
        "memopt.embedding_rows": embedding_gradient.rows_scratch_bytes,
    }


@functools.cache
def specs() -> tuple["KernelSpec", ...]:
    """What every kernel that is one operator states of itself."""
    from memopt.kernels import (
        banded_attention,
        bits,
        gated,
        gated_packed,
        masking,
        norm,
        quantise,
        rotary,
        softmax,
    )

    modules = (
        norm,
        gated,
        gated_packed,
        rotary,
        softmax,
        bits,
        masking,
        quantise,
        banded_attention,
    )
    return tuple(spec for module in modules for spec in module.SPECS)


@functools.cache
def cut_table() -> Mapping[str, Callable[..., bool]]:
    """Which operators take 0 for ``chunk_rows``, no logits in memory, and with which arguments."""
    from memopt.kernels import linear_cross_entropy

    return dict.fromkeys(_CROSS_ENTROPIES, linear_cross_entropy.can_be_cut)
