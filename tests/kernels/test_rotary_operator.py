"""What the rotary operators promise: derivatives, strides, one graph, and what they refuse."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from memopt._torch import CustomGraphPass, capture_output_code, inductor_config
from memopt.errors import ConfigError
from memopt.kernels.rotary import ROTARY, ROTARY_IN_PLACE, fits_in_place, scratch_bytes
from tests.kernels.rotary_cases import heads, tables, with_gradients
from tests.references import LOW_PRECISION, assert_equal_in_float64
from tests.scratch import assert_scratch_is

OPTIONS = [(interleaved, inverse) for interleaved in (False, True) for inverse in (False, True)]


@pytest.mark.parametrize(("interleaved", "inverse"), OPTIONS)
@pytest.mark.parametrize("width", [3, 6])
def test_first_and_second_derivatives_are_right(
    interleaved: bool, inverse: bool, width: int
) -> None:
    q, k = heads(size=8).requires_grad_(), heads(count=1, size=8).requires_grad_()
    given: Any = q, k, *tables(1, width=width), 6, interleaved, inverse
    assert torch.autograd.gradcheck(ROTARY, given)
    assert torch.autograd.gradgradcheck(ROTARY, given)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_may_go_unused(used: int) -> None:
    q, k = heads().requires_grad_(), heads(count=3).requires_grad_()
    options = *tables(), 8, False, False
    results = ROTARY(q, k, *options)
    gradients = torch.autograd.grad(results[used].sum(), (q, k), allow_unused=True)
    assert gradients[1 - used] is None
    ones = [torch.ones_like(t) for t in (q, k)]
    expected = ROTARY(*ones, *options[:-1], True)[used]
    assert torch.equal(gradients[used], expected)


def test_nothing_is_saved_but_the_tables() -> None:
    q, k, (cos, sin) = heads().requires_grad_(), heads().requires_grad_(), tables()
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ROTARY(q, k, cos, sin, 8, False, False)
    assert [t.data_ptr() for t in saved] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize(("interleaved", "inverse"), OPTIONS)
def test_the_inverse_undoes(interleaved: bool, inverse: bool) -> None:
    q, k, turned = heads(), heads(count=2), tables()
    there = ROTARY(q, k, *turned, 8, interleaved, inverse)
    assert_equal_in_float64(ROTARY(*there, *turned, 8, interleaved, not inverse), [q, k])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0)])
def test_results_keep_the_strides(order: tuple[int, ...]) -> None:
    shape = (2, 4, 5, 8)
    dense = torch.randn([shape[i] for i in order], dtype=torch.float64)
    q = dense.permute([order.index(i) for i in range(4)])
    turned_by = tables()
    turned, _ = ROTARY(q, q, *turned_by, 8, False, False)
    assert turned.stride() == (q if order[-1] == 3 else q.contiguous()).stride()
    assert_equal_in_float64([turned], [ROTARY(q.contiguous(), q, *turned_by, 8, False, False)[0]])


def test_the_order_of_strides_is_kept_where_they_leave_gaps() -> None:
    packed = heads(count=6)
    q, k = packed[:, :4], packed[:, 4:]
    turned = ROTARY(q, k, *tables(), 8, False, False)
    assert all(t.transpose(1, 2).is_contiguous() for t in turned)


def test_there_may_be_no_keys() -> None:
    q, turned = heads(), tables()
    alone, nothing = ROTARY(q, q[:, :0], *turned, 8, False, False)
    assert torch.equal(alone, ROTARY(q, q, *turned, 8, False, False)[0])
    assert nothing.shape == (2, 0, 5, 8)


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64], ids=str)
@pytest.mark.parametrize(("interleaved", "inverse"), OPTIONS)
@pytest.mark.parametrize("rotary_dim", [6, 8])
def test_in_place_gives_the_same_bits(
    dtype: torch.dtype, interleaved: bool, inverse: bool, rotary_dim: int
) -> None:
    packed = heads(count=7, dtype=dtype)
    options = *tables(width=rotary_dim), rotary_dim, interleaved, inverse
    expected = ROTARY(packed[:, :4], packed[:, 4:6], *options)
    others = packed[:, 6:].clone()
    ROTARY_IN_PLACE(packed[:, :4], packed[:, 4:6], *options)
    assert torch.equal(packed, torch.cat([*expected, others], 1))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_functionalisation_takes_it_in_place(backend: str) -> None:
    options = *tables(), 8, False, False

    def function(x: Tensor) -> Tensor:
        q, k = (x * 2).unbind(0)
        ROTARY_IN_PLACE(q, k, *options)
        return q * k

    x = torch.stack([heads(), heads()])
    torch.testing.assert_close(torch.compile(function, backend=backend)(x), function(x))


class _InPlace(CustomGraphPass):
    """Puts the operator in place where it would return new tensors."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=ROTARY):
            with graph.inserting_before(node):
                graph.call_function(ROTARY_IN_PLACE, node.args)
            for result in list(node.users):
                result.replace_all_uses_with(node.args[result.args[1]])
                graph.erase_node(result)
            graph.erase_node(node)

    def uuid(self) -> None:
        """None: nothing is cached."""


@pytest.mark.slow
def test_behind_functionalisation_it_writes_into_what_a_product_returned() -> None:
    turned, weight = tables(1), torch.randn(6, 8 * 8, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        packed = (x @ weight).view(2, 5, 8, 8).transpose(1, 2)
        q, k, v = packed.split_with_sizes([4, 2, 2], 1)
        q, k = ROTARY(q, k, *turned, 8, False, False)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    code: list[str] = []
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    passes = inductor_config.patch(post_grad_custom_post_pass=_InPlace())
    with passes, torch.no_grad(), capture_output_code(code.append):
        actual = torch.compile(function)(x)
    assert_equal_in_float64([actual], [function(x)])
    (emitted,) = code
    assert "memopt.rotary_.default(reinterpret_tensor(" in emitted
    assert "memopt.rotary.default(" not in emitted
    assert emitted.count("empty_strided_cpu(") == 1  # the product


def test_the_operator_in_place_keeps_torchs_contracts() -> None:
    given = heads(), heads(), *tables(), 8, False, False
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ROTARY_IN_PLACE, given, test_utils=checks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_one_graph_does_for_all_sizes(backend: str, interleaved: bool) -> None:
    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ROTARY(q * 2, k, cos, sin, 8, interleaved, False)
        return q + 1, k

    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, positions in ((3, 5), (6, 7), (9, 33)):
            q, k = heads(batch, 4, positions), heads(batch, 2, positions)
            turned = tables(batch, positions)
            actual = with_gradients(lambda q, k: compiled(q, k, *turned), q, k)  # noqa: B023
            expected = with_gradients(lambda q, k: function(q, k, *turned), q, k)  # noqa: B023
            assert_equal_in_float64(actual, expected)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_a_table_that_is_trained_is_refused(name: str) -> None:
    cos, sin = tables()
    {"cos": cos, "sin": sin}[name].requires_grad_()
    with pytest.raises(ConfigError, match=rf"{name} requires a gradient.*detach"):
        ROTARY(heads(), heads(), cos, sin, 8, False, False)
    with torch.no_grad():
        ROTARY(heads(), heads(), cos, sin, 8, False, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"q": heads(size=6)},
        {"q": heads()[0]},
        {"k": heads(batch=1)},
        {"k": heads(positions=4)},
        {"k": heads(dtype=torch.float32)},
        {"cos": tables(width=2)[0]},
        {"cos": tables(batch=1)[0][0]},
        {"sin": tables(width=8)[0]},
        {"sin": tables(batch=3)[0]},
        {"rotary_dim": 7},
        {"rotary_dim": 10},
        {"rotary_dim": 0},
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    cos, sin = tables()
    given = {"q": heads(), "k": heads(), "cos": cos, "sin": sin, "rotary_dim": 8, **changes}
    for operator in (ROTARY, ROTARY_IN_PLACE):
        with pytest.raises(ConfigError, match="allowed"):
            operator(*given.values(), False, False)


@pytest.mark.parametrize(
    "q",
    [
        heads()[:, :1].expand(-1, 4, -1, -1),
        torch.randn(100).double().as_strided((2, 4, 5, 8), (20, 8, 4, 1)),
        torch.randn(2, 4, 5, 16).double()[..., ::2],
    ],
    ids=["expanded", "overlapping", "apart"],
)
def test_in_place_takes_elements_that_have_a_place_of_their_own(q: Tensor) -> None:
    assert not fits_in_place(q)
    before = q.clone()
    with pytest.raises(ConfigError, match="use rotary"):
        ROTARY_IN_PLACE(q, heads(), *tables(), 8, False, False)
    assert torch.equal(q, before)
    ROTARY(q, heads(), *tables(), 8, False, False)


def test_in_place_has_no_gradient() -> None:
    with pytest.raises(ConfigError, match="requires a gradient"):
        ROTARY_IN_PLACE(heads().requires_grad_() * 1, heads(), *tables(), 8, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_dim", [32, 64])
def test_scratch_is_what_the_formula_says(dtype: torch.dtype, rotary_dim: int) -> None:
    q, k = heads(2, 8, 256, 64, dtype), heads(2, 2, 256, 64, dtype)
    given = q, k, *tables(1, 256, rotary_dim, torch.float16), rotary_dim, False, False
    assert_scratch_is(scratch_bytes(*given), lambda: ROTARY(*given))
    assert_scratch_is(scratch_bytes(*given), lambda: ROTARY_IN_PLACE(*given))
