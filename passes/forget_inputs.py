"""Take from a backward the inputs that it needs the shape of, so that nothing holds them for it.

A convolution's backward takes the input even where only the gradient of the input is asked for,
which the weight alone decides. With frozen weights that is every convolution's input.

Pays: bytes of those inputs, for nothing. Exact: the same kernels run.

Source: which inputs a partly frozen model needs is asked by Chen et al. (2016), "Training Deep
Nets with Sublinear Memory Cost", arXiv:1604.06174, for whole layers; for single arguments of
torch's operators the answer is memopt's.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from memopt.graph import aten, source_line
from memopt.kernels.input_gradient import INPUT_GRADIENT
from memopt.passes.joint_nodes import call
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_CONVOLUTION = aten.convolution_backward.default


@dataclass(frozen=True)
class ForgetInputs:
    """``convolution_backward(dy, x, w)[0]`` -> ``convolution_input_gradient(dy, w, x.shape)``."""

    name: ClassVar[str] = "forget_inputs"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = 0
        for node in graph.find_nodes(op="call_function", target=_CONVOLUTION):
            dy, x, weight, _, *geometry, mask = node.args
            value = x.meta["val"]
            if [*mask] != [True, False, False] or not _is_static(value):
                continue
            (part,) = (n for n in node.users if n.target is operator.getitem and n.args[1] == 0)
            with graph.inserting_before(node):
                shape, strides = [*value.shape], [*value.stride()]
                own = call(graph, INPUT_GRADIENT, dy, weight, shape, strides, *geometry, like=part)
            part.replace_all_uses_with(own)
            text = f"{x.name} is not held for it: its shape is enough where the weight is frozen"
            ctx.remark(self.name, RemarkKind.APPLIED, text, node.name, source_line(node))
            rewrites += 1
        return rewrites


def _is_static(value: Any) -> bool:
    return all(isinstance(n, int) for n in (*value.shape, *value.stride()))
