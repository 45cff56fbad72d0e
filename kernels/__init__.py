"""The kernels: one file each, with the reference that defines it beside it.

Import them as ``memopt.kernels``. The folder is called ``kernels`` only in the source tree.
"""

if __name__ != "memopt.kernels":
    raise ImportError(f"import memopt.kernels, not {__name__}: it would be loaded a second time")

import functools
from collections.abc import Callable, Mapping


@functools.cache
def scratch_table() -> Mapping[str, Callable[..., int]]:
    """What each operator allocates besides its results, in bytes, from its arguments."""
    from memopt.kernels import contrastive, divergence, embedding_gradient, linear_cross_entropy

    forms = ("", "_rows", "_rows_backward")
    return {
        **{f"memopt.linear_cross_entropy{f}": linear_cross_entropy.scratch_bytes for f in forms},
        **{f"memopt.linear_divergence{f}": divergence.scratch_bytes for f in forms},
        "memopt.contrastive": contrastive.scratch_bytes,
        "memopt.embedding_gradient": embedding_gradient.scratch_bytes,
    }
