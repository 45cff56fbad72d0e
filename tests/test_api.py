"""``memopt.optimize`` on whatever may be compiled, and the entry point of ``torch.compile``."""

from typing import Any

import pytest
import torch
from torch import nn

import memopt
from memopt.errors import ConfigError
from tests.graphs import gradients

OPTIONS: dict[str, Any] = {"lowering": "eager", "memory_budget": "min"}


class Net(nn.Module):
    """A small net that counts how often Python runs its forward."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.last = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two layers."""
        total: torch.Tensor = self.last(self.first(x).tanh()).sum()
        return total


def square() -> torch.Tensor:
    return torch.randn(8, 8, requires_grad=True)


def is_compiled(run: Any) -> bool:
    """Whether running it compiles anything."""
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.reset()
    run()
    return counters["stats"]["unique_graphs"] > 0


def test_torch_finds_the_backend_by_name() -> None:
    assert "memopt" in torch.compiler.list_backends()


def test_a_function_is_optimized_by_call_and_by_decorator() -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).tanh().sum()

    @memopt.optimize(lowering="eager", memory_budget="min")
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).tanh().sum()

    x = square()
    expected = gradients([plain(x)], [x])
    for compiled in (memopt.optimize(plain, **OPTIONS), decorated):
        assert is_compiled(lambda f=compiled: f(x))
        torch.testing.assert_close(gradients([compiled(x)], [x]), expected)
    assert decorated.__name__ == "decorated"


def test_an_instance_is_compiled_in_place_and_stays_what_it_is() -> None:
    net, x = Net(), square()
    names = list(net.state_dict())
    expected = net(x)
    assert memopt.optimize(net, **OPTIONS) is net
    assert type(net) is Net
    assert list(net.state_dict()) == names
    assert is_compiled(lambda: net(x))
    torch.testing.assert_close(net(x), expected)


def make_class() -> type[Net]:
    @memopt.optimize(**OPTIONS)
    class Optimized(Net):
        """Documented."""

    return Optimized


def test_a_class_keeps_its_name_type_and_documentation() -> None:
    cls = make_class()
    assert cls.__name__ == "Optimized"
    assert cls.__doc__ == "Documented."
    assert issubclass(cls, Net)
    net = cls(width=4)
    assert isinstance(net, cls)
    assert net.first.out_features == 4
    assert is_compiled(lambda: net(square()))


def test_the_class_that_an_optimized_one_extends_stays_as_it_is() -> None:
    make_class()
    assert not is_compiled(lambda: Net()(square()))


def test_a_subclass_of_an_optimized_class_works_and_is_compiled_too() -> None:
    class Wider(make_class()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(width=16)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scaled: torch.Tensor = super().forward(x) * self.scale
            return scaled

    net, x = Wider(), square()
    assert isinstance(net, Net)
    assert next(iter(net.state_dict())) == "scale"
    expected = Net.forward(net, x) * 2
    torch.testing.assert_close(net(x), expected)
    assert is_compiled(lambda: net(x))


@pytest.mark.parametrize("target", [Net, Net(), lambda x: x])
def test_a_wrong_option_is_refused_before_anything_is_compiled(target: Any) -> None:
    with pytest.raises(ConfigError, match="memory_budget"):
        memopt.optimize(target, memory_budgt=0.5)
    with pytest.raises(ConfigError, match="memory_budget"):
        memopt.optimize(memory_budget="lots")(target)


@pytest.mark.parametrize("target", [3, dict, "model"])
def test_what_cannot_be_compiled_is_refused_by_name(target: Any) -> None:
    with pytest.raises(TypeError, match=r"memopt\.optimize takes"):
        memopt.optimize(target, **OPTIONS)


def test_arguments_of_torch_compile_are_handed_on() -> None:
    @memopt.optimize(fullgraph=True, lowering="eager")
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x.sin()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        breaks(square())


def test_explain_leaves_the_model_as_it_was() -> None:
    net, x = Net(), square()
    report = memopt.explain(net, x, options=OPTIONS)
    assert len(report.to_dict()["graphs"]) == 1
    assert not is_compiled(lambda: net(x))
    assert net._compiled_call_impl is None


def test_a_message_between_head_and_loss_does_not_break_the_graph() -> None:
    from transformers.utils import logging

    logger = logging.get_logger("transformers.memopt_test")

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        logger.warning_once("said once")
        return y.sum()

    compiled = memopt.optimize(function, fullgraph=True, lowering="eager")
    assert compiled(torch.ones(3)) == 6
