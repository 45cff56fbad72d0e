"""``memopt.explain``: compile, run the forward once, and say what was done."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from memopt._torch import BackendCompilerFailed
from memopt.backend import compile_graph, read_options
from memopt.pipeline import Compiled
from memopt.record import GraphRecord
from memopt.report import Report


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """What memopt does to ``model`` on these inputs: which bytes go, at what price, and why.

    Compiles every graph of ``model(*inputs, **kwargs)`` as ``torch.compile`` would, both halves
    at once, reads the peak off the emitted code, and runs the forward once, with the caller's
    gradient mode. The model is left as it was: nothing compiled stays attached to it.

    Args:
        model: a function or module.
        *inputs: its positional inputs.
        options: as for ``torch.compile(backend="memopt", options=...)``.
        mode: as for ``torch.compile``.
        dynamic: as for ``torch.compile``.
        **kwargs: its keyword inputs.

    Raises:
        ConfigError: an option is unknown or impossible.
        BudgetInfeasibleError: no plan fits.
    """
    config = read_options(options, mode=mode)
    records: list[GraphRecord] = []

    def note(record: GraphRecord) -> None:
        records.append(dataclasses.replace(record, id=f"graph {len(records)}"))

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Compiled:
        return compile_graph(gm, example_inputs, config, note)

    forward = model.forward if isinstance(model, nn.Module) else model
    compiled = torch.compile(forward, backend=backend, dynamic=dynamic)
    try:
        compiled(*inputs, **kwargs)
    except BackendCompilerFailed as error:
        if error.inner_exception is not None:
            raise error.inner_exception from None
        raise
    return Report(tuple(records))
