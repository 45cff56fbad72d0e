"""``memopt.optimize`` compiles ``values[mask]``, which ``torch.compile`` breaks the graph at."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from memopt._torch import dynamo_config, dynamo_counters

CLASSES = 307


class Distilled(nn.Module):
    """Jensen-Shannon of the tokens that have a label."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        p, q = self.head(x).log_softmax(-1), teacher.log_softmax(-1)
        mixture = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        jsd = 0.5 * F.kl_div(mixture, p, reduction="none", log_target=True)
        jsd = jsd + 0.5 * F.kl_div(mixture, q, reduction="none", log_target=True)
        mask = y != -100
        return jsd[mask].sum() / mask.sum()


class Routed(nn.Module):
    """Picked rows go through layers of their own, and their number is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        picked = self.inner(x[y != -100])
        if picked.shape[0] > 1:
            picked = picked * 2
        return F.cross_entropy(self.head(picked), y[y != -100]) + teacher.mean()


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randint(0, CLASSES, (3, length))
    y[:, ::2] = -100
    return torch.randn(3, length, 16), torch.randn(3, length, CLASSES), y


def gradients(run: Any, module: nn.Module, *args: Tensor) -> list[Tensor]:
    module.zero_grad()
    loss = run(*args)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def check(run: Any, module: nn.Module, plain: nn.Module) -> None:
    plain.load_state_dict(module.state_dict())
    for length in (6, 9, 12):
        args = inputs(length)
        mine, eager = gradients(run, module, *args), gradients(plain, plain, *args)
        for a, e in zip(mine, eager, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("budget", [None, "min"])
def test_picked_rows_break_no_graph_and_give_eagers_numbers(
    lowering: str, budget: str | None
) -> None:
    dynamo_counters.clear()
    module = memopt.optimize(Distilled(), lowering=lowering, memory_budget=budget)
    check(module, module, Distilled())
    assert not dynamo_counters["graph_break"]
    assert dynamo_counters["stats"]["unique_graphs"] == 2  # one length, then any


@pytest.mark.parametrize("kind", ["function", "class"])
def test_functions_and_classes_pick_rows_too(kind: str) -> None:
    dynamo_counters.clear()
    if kind == "function":
        module: nn.Module = Distilled()
        run: Any = memopt.optimize(module.forward, lowering="eager", fullgraph=True)
    else:
        module = memopt.optimize(type("Own", (Distilled,), {}), lowering="eager")()
        run = module
    check(run, module, Distilled())
    assert not dynamo_counters["graph_break"]


def test_the_setting_is_that_of_the_call_and_no_other() -> None:
    assert not dynamo_config.capture_dynamic_output_shape_ops
    module = memopt.optimize(Distilled(), lowering="eager")
    module(*inputs(6)).backward()
    assert not dynamo_config.capture_dynamic_output_shape_ops
    torch._dynamo.reset()
    dynamo_counters.clear()
    torch.compile(Distilled(), backend="memopt", options={"lowering": "eager"})(*inputs(6))
    assert dynamo_counters["graph_break"]


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_picked_rows_in_the_middle_of_a_model_give_eagers_numbers(lowering: str) -> None:
    module = memopt.optimize(Routed(), lowering=lowering)
    check(module, module, Routed())


def test_a_compiled_function_may_call_an_optimized_one() -> None:
    module = Distilled()
    inner = memopt.optimize(module.forward, lowering="eager")

    def twice(x: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = inner(x, teacher, y)
        return loss * 2

    outer = memopt.optimize(twice, lowering="eager", fullgraph=True)
    args = inputs(6)
    torch.testing.assert_close(outer(*args), module(*args) * 2)
