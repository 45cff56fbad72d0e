"""Predicates over nodes: what may run twice, what is a view, what draws numbers."""

from typing import Any

import pytest
import torch
from torch import fx

from memopt.graph import OpKind, is_recomputable, is_view, op_kind

aten = torch.ops.aten


def node(target: Any, *args: Any, value: Any = None, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    inputs = tuple(graph.placeholder(a[1:]) if str(a).startswith("%") else a for a in args)
    made = graph.call_function(target, inputs, kwargs)
    made.meta["val"] = torch.empty(4, 4, device="meta") if value is None else value
    return made


@pytest.mark.parametrize(
    "target",
    [
        aten.native_dropout.default,
        aten.rand_like.default,
        aten.bernoulli.p,
        aten.add_.Tensor,
        aten.copy_.default,
        torch.ops._c10d_functional.all_reduce.default,
        torch.ops._c10d_functional.wait_tensor.default,
    ],
)
def test_what_could_change_by_running_again_is_not_recomputable(target: Any) -> None:
    assert not is_recomputable(node(target, "%x"))


@pytest.mark.parametrize("target", [aten.mm.default, aten.tanh.default, aten.sum.default])
def test_a_deterministic_operator_is_recomputable(target: Any) -> None:
    assert is_recomputable(node(target, "%x", "%y"))


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_attention_draws_numbers_only_where_it_drops_some(probability: float) -> None:
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert is_recomputable(node(attention, "%q", "%k", "%v", probability)) == (probability == 0)
    by_name = node(attention, "%q", "%k", "%v", dropout_p=probability)
    assert is_recomputable(by_name) == (probability == 0)


def test_a_custom_operator_is_opaque() -> None:
    with torch.library._scoped_library("memopt_graph_tests", "DEF") as library:
        library.define("opaque(Tensor x) -> Tensor")
        assert not is_recomputable(node(torch.ops.memopt_graph_tests.opaque.default, "%x"))


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (aten.t.default, OpKind.VIEW),
        (aten._unsafe_view.default, OpKind.VIEW),
        (aten.detach.default, OpKind.VIEW),
        (aten.tanh.default, OpKind.POINTWISE),
        (aten.clone.default, OpKind.POINTWISE),
        (aten.sum.dim_IntList, OpKind.REDUCTION),
        (aten.mm.default, OpKind.EXTERN),
        (torch.ops._c10d_functional.all_reduce.default, OpKind.EXTERN),
    ],
)
def test_each_operator_has_its_kind(target: Any, kind: OpKind) -> None:
    made = node(target, "%x")
    assert op_kind(made) is kind
    assert is_view(made) == (kind is OpKind.VIEW)


def test_a_number_takes_no_bytes() -> None:
    assert op_kind(node(aten.sym_size.int, "%x", 0, value=3)) is OpKind.SYMBOL
