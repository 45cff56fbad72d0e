"""Bisecting by pass name finds the one that makes the difference."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from memopt.backend import PASSES
from memopt.errors import ConfigError
from memopt.passes.weigh_rows import WeighRows

NAMES = list(dict.fromkeys(p.name for p in PASSES if getattr(p, "default", True)))
NAMES.remove("clone_mutated_inputs")


def runs(options: dict[str, Any], name: str) -> bool:
    return options["passes"].get(name) is not False


@pytest.mark.parametrize("name", NAMES)
def test_it_finds_the_pass_by_name(name: str) -> None:
    tries = []

    def is_right(options: dict[str, Any]) -> bool:
        tries.append(options)
        return not runs(options, name)

    assert memopt.bisect(is_right, {"memory_budget": "min"}) == name
    assert len(tries) <= 8
    assert all(options["memory_budget"] == "min" for options in tries)


def test_a_pass_that_needs_an_earlier_one_is_found() -> None:
    def is_right(options: dict[str, Any]) -> bool:
        return not (runs(options, "chunk_losses") and runs(options, "early_masks"))

    assert memopt.bisect(is_right) == "early_masks"


def test_what_is_named_is_looked_at_with_its_options_and_what_is_off_stays_off() -> None:
    given = {"compress": {"bits": 4}, "cut_maps": False}

    def is_right(options: dict[str, Any]) -> bool:
        assert options["passes"]["cut_maps"] is False
        return bool(options["passes"]["compress"] != {"bits": 4})

    assert memopt.bisect(is_right, {"passes": given}) == "compress"


def test_what_keeps_inputs_whole_may_be_off() -> None:
    off = {"passes": {"clone_mutated_inputs": False}}
    assert memopt.bisect(lambda options: not runs(options, "weigh_rows"), off) == "weigh_rows"


def test_without_any_pass_it_is_none_of_them() -> None:
    assert memopt.bisect(lambda options: False) is None


def test_where_all_is_well_there_is_nothing_to_find() -> None:
    with pytest.raises(ConfigError, match="nothing to look for"):
        memopt.bisect(lambda options: True)


def test_wrong_options_are_told_before_anything_is_compiled() -> None:
    with pytest.raises(ConfigError, match="unknown pass 'chunk_loss'"):
        memopt.bisect(lambda options: False, {"passes": {"chunk_loss": True}})


def test_a_pass_that_breaks_gradients_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is broken on purpose: it has the graph's last sum twice."""
    real = WeighRows.__call__

    def broken(self: WeighRows, graph: Any, ctx: Any) -> int:
        (output,) = graph.find_nodes(op="output")
        (loss,) = output.args[0]
        with graph.inserting_before(output):
            twice = graph.call_function(torch.add, (loss, loss))
        twice.meta.update(loss.meta)
        output.args = ((twice,),)
        return 1 + real(self, graph, ctx)

    monkeypatch.setattr(WeighRows, "__call__", broken)
    head, x, y = nn.Linear(8, 512), torch.randn(4, 8), torch.arange(4)

    def loss_of(x: Tensor) -> Tensor:
        return F.cross_entropy(head(x), y)

    def is_right(options: dict[str, Any]) -> bool:
        torch._dynamo.reset()
        compiled = torch.compile(loss_of, backend="memopt", options=options)
        return torch.allclose(compiled(x), loss_of(x))

    assert memopt.bisect(is_right, {"lowering": "eager"}) == WeighRows.name
