"""One random model run by memopt and by eager: numbers, gradients, states, errors, bytes."""

import copy
import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, fx, nn

import memopt
from bench.meter import Meter
from memopt._torch import inductor_config, pytree
from memopt.backend import compile_graph, read_options
from memopt.device import DEVICES
from memopt.planner.problem import Candidate
from memopt.planner.search import Search
from memopt.record import GraphRecord
from tests.fuzz.cases import Case
from tests.fuzz.comparing import DifferenceError, Results, compare
from tests.fuzz.models import RandomModel
from tests.training import _Float64

Kind = Literal["same", "torch", "wrong", "crash", "memory"]
_SLACK_BYTES = 2**15  # what the engine around the graphs takes


@dataclass(frozen=True)
class Verdict:
    """What became of one model.

    Attributes:
        kind: as eager; not to be compared, since torch's own compiler fails alike; other numbers;
            an error that is no refusal of a budget; more memory than was promised.
        detail: what differs, or the error.
        refused: whether the budget drawn was refused, and the lowest one was taken.
        measured_bytes: the peak of the second step; 0 where it was not measured.
        predicted_bytes: what memopt said that it would be.
    """

    kind: Kind
    detail: str = ""
    refused: bool = False
    measured_bytes: int = 0
    predicted_bytes: int = 0


def check(case: Case, *, lowering: str = "eager") -> Verdict:
    """Compile a model, run two steps, and compare with eager, whose random numbers are drawn."""
    rounding = _rounding() if case.kind == "compressed" else nullcontext()
    eagers_draws = inductor_config.patch(fallback_random=True)
    with warnings.catch_warnings(), rounding, eagers_draws:
        warnings.simplefilter("ignore")
        try:
            expected = truth = run(case, lambda model: model)
            if lowering != "eager" or case.is_low or "float32" in repr(case.model()):
                exact = dataclasses.replace(case, exact=True)
                truth = run(exact, lambda model: model, _Float64)
        except Exception as error:
            return Verdict("torch", f"eager: {error}")
        if any(_is_wild(value) for value in expected.values()):
            return Verdict("torch", "numbers that are no numbers")
        options = {**case.options, "lowering": lowering}
        verdict = _attempt(case, options, expected, truth)
        if verdict.kind == "wrong" and case.kind == "float64":
            verdict = _attempt(case, options, run(case, _nudged), expected)
        if verdict.kind in ("wrong", "crash"):
            backend = "aot_eager" if lowering == "eager" else "inductor"
            stock = _stock(case, backend, expected, truth)
            if stock:
                return dataclasses.replace(verdict, kind="torch", detail=f"{backend}: {stock}")
        return verdict


@torch.no_grad()
def _nudged(model: RandomModel) -> RandomModel:
    """With weights off by a few roundings: what that changes, other orders of sums may as well."""
    for p in model.parameters():
        p.mul_(1 + 1e-15 * torch.randn_like(p))
    return model


@contextmanager
def _rounding() -> Iterator[None]:
    """Plans hold many values in fewer bits; those of models this small would else hold none.

    Arithmetic is so slow that no value is cheaper to make again, and of the levels the one with
    the most values in another form is taken.
    """
    slow = dataclasses.replace(DEVICES["cpu"], flops={"float32": 1e6}, launch_seconds=0.0)

    def plan(search: Search, budget_bytes: int | None) -> Candidate:
        forms = {e.encoded for e in search.problem.joint.encodings}
        return max(search.levels, key=lambda level: len(forms & level.saved))

    with mock.patch.dict(DEVICES, cpu=slow), mock.patch.object(Search, "plan", plan):
        yield


def _attempt(case: Case, options: dict[str, Any], expected: Results, truth: Results) -> Verdict:
    records: list[GraphRecord] = []
    refused, before, last = False, -1, ""
    while True:
        config = read_options(options)
        records.clear()

        def backend(gm: fx.GraphModule, inputs: Sequence[Any], config: Any = config) -> Any:
            return compile_graph(gm, inputs, config, records.append)

        try:
            made = list[Any]()

            def prepare(model: RandomModel, backend: Any = backend, made: Any = made) -> Any:
                made += [model, _compiled(model, backend, case.dynamic)]
                return made[1]

            actual = run(case, prepare)
            break
        except Exception as error:
            told = getattr(error, "inner_exception", error)
            if not isinstance(told, memopt.BudgetInfeasibleError):
                frame = traceback.extract_tb(told.__traceback__)[-1]
                where = f"{frame.filename}:{frame.lineno}"
                return Verdict("crash", f"{type(told).__name__}: {told} at {where}", refused)
            if told.floor_bytes <= told.budget_bytes:
                return Verdict("crash", f"refused what fits: {told}")
            if len(records) <= before:  # with what was advised, a graph fits
                text = f"refused what it had asked for: {told}\nbefore: {last}"
                return Verdict("crash", text[:4000], refused)
            refused, before, last = True, len(records), str(told)
            options = {**options, "memory_budget": told.advised}
            del told  # and the frames, with what the graphs before it hold
    try:
        compare(case, actual, expected, truth)
    except DifferenceError as difference:
        return Verdict("wrong", str(difference), refused)
    return _measured(case, made[0], made[1], records, refused)


def _compiled(model: nn.Module, backend: Any, dynamic: bool | None) -> Callable[..., Any]:
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=dynamic)
    return compiled


def _stock(case: Case, backend: str, expected: Results, truth: Results) -> str:
    """What is wrong with torch's own compiler; nothing where it does as eager."""
    try:
        actual = run(case, lambda model: _compiled(model, backend, case.dynamic))
        compare(case, actual, expected, truth)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def run(
    case: Case,
    prepare: Callable[[RandomModel], Any],
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Results:
    """All results of two steps, by name: outputs, gradients, inputs and buffers.

    Args:
        case: the model and what it is given.
        prepare: compiles it, or leaves it as it is.
        mode: that the steps run in.
    """
    model = case.model()
    function = prepare(model)
    results: Results = {}
    for number in range(2):
        inputs = case.inputs(number)
        with mode():
            own = step(case, model, function, inputs, number)
        results |= {f"step {number} {name}": value for name, value in own.items()}
        if case.trains and case.optimises:
            _descend(model)
    results |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    return results


def step(
    case: Case, model: nn.Module, function: Callable[..., Any], inputs: list[Tensor], number: int
) -> Results:
    """One step; its gradients stay in the model."""
    torch.manual_seed(11 + number)
    with torch.set_grad_enabled(case.trains), case.autocast():
        returned = function(*inputs)
    leaves = pytree.tree_leaves(returned)
    results: Results = {}
    for i, leaf in enumerate(leaves):
        results[f"output {i}"] = _snapshot(leaf)
    differentiable = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    if case.by_loss_alone:
        differentiable = differentiable[:1]
    if differentiable:
        torch.autograd.backward(differentiable, [_upstream(t) for t in differentiable])
        for name, p in model.named_parameters():
            results[f"gradient {name}"] = None if p.grad is None else p.grad.clone()
    for i, given in enumerate(inputs):
        results[f"input {i}"] = given.detach().clone()
        if given.requires_grad:
            results[f"input {i} gradient"] = None if given.grad is None else given.grad.clone()
    return results


def _snapshot(leaf: Any) -> Any:
    """The numbers as they are now: of logits that are not kept, a copy would be computed later."""
    if not isinstance(leaf, Tensor):
        return leaf
    value = leaf.detach()
    return value + 0 if value.is_floating_point() else value.clone()


def _upstream(output: Tensor) -> Tensor:
    """1 for a loss, which most are given; other numbers for the rest."""
    if not output.dim():
        return torch.ones_like(output)
    numbers = torch.linspace(-1, 1, output.numel(), dtype=torch.float64)
    return numbers.view(output.shape).to(output.dtype)


@torch.no_grad()
def _descend(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.sub_(0.01 * p.grad / (1 + p.grad.norm()))


def _is_wild(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all()


def _measured(
    case: Case, model: nn.Module, function: Any, records: list[GraphRecord], refused: bool
) -> Verdict:
    """The verdict on the bytes of a step that is one graph."""
    if len(records) != 1 or case.dynamic is not False:
        return Verdict("same", "", refused)
    (record,) = records

    def once() -> Any:
        inputs = case.inputs(0)
        model.zero_grad(set_to_none=True)
        state = copy.deepcopy(model.state_dict())
        with Meter() as meter:
            torch.manual_seed(11)
            with torch.set_grad_enabled(case.trains), case.autocast():
                returned = function(*inputs)
            leaves = [t for t in pytree.tree_leaves(returned) if isinstance(t, Tensor)]
            loss = next((t for t in leaves if t.requires_grad), None)
            if loss is not None:
                loss.backward(torch.ones_like(loss))
        model.load_state_dict(state)
        return meter.peak_bytes

    measured, predicted = once(), record.predicted_peak_bytes
    tolerance = max(measured // 100, _SLACK_BYTES)
    detail = ""
    if record.budget_bytes is not None and measured > record.budget_bytes + _SLACK_BYTES:
        detail = f"{measured} bytes, over the budget of {record.budget_bytes}, said {predicted}"
    elif record.training and abs(measured - predicted) > tolerance:
        detail = f"{measured} bytes, and {predicted} were said"
    kind: Kind = "memory" if detail else "same"
    return Verdict(kind, detail, refused, measured, predicted)
