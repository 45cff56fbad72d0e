"""``memopt.plan_for`` and ``memopt.advise``: plans for a device that is not here.

The model is made and traced on fake tensors, so neither its weights nor its activations take
memory. The passes and the planner are those of a compilation; nothing is compiled.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from memopt import diagnosis
from memopt._torch import (
    BackendCompilerFailed,
    FakeTensor,
    FakeTensorMode,
    disable_modes,
    dynamo_config,
    no_truncated_normals,
    pytree,
)
from memopt.backend import read_options
from memopt.config import Config
from memopt.errors import BudgetInfeasibleError, ConfigError
from memopt.lowering import interpret_planned
from memopt.passes import PRE_GRAD
from memopt.pipeline import Compiled, PassContext, Pipeline
from memopt.proofs import Proof
from memopt.report import Report
from memopt.splitting import Splitter

_READ = 4096  # numbers of a tensor that a model's code may read
Make = Callable[..., tuple[Callable[..., Any], Mapping[str, Any]]]


def plan_for(
    make: Make,
    *,
    device: str,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Report:
    """What memopt would do to a model on a device, with memory for neither.

    Peaks, seconds and decisions are the planner's model; nothing certifies them.

    Args:
        make: makes the model, and its keyword inputs. It is called on fake tensors: what it
            allocates takes no memory, and may not be read.
        device: a name in the device table, such as ``"h100"``.
        options: as for ``torch.compile(backend="memopt", options=...)``.
        mode: as for ``torch.compile``.

    Raises:
        ConfigError: an option is unknown or impossible, or no such device is known.
        BudgetInfeasibleError: no plan fits.
    """
    config = read_options({**(options or {}), "device": device}, mode=mode)
    records = []
    for number, split in enumerate(plan_with(make, config)):
        record = diagnosis.make_record(split, Proof.of(split, None))
        records.append(dataclasses.replace(record, id=f"graph {number}"))
    return Report(tuple(records))


def plan_with(
    make: Make, config: Config, splitter: Callable[[Config, PassContext], Splitter] = Splitter
) -> list[Splitter]:
    """The splitters that have planned the graphs of a step, as if Inductor were to compile them.

    Args:
        make: as for `plan_for`.
        config: with the name of a device in it.
        splitter: makes a graph's, of the configuration and of where passes speak.

    Raises:
        BudgetInfeasibleError: no plan fits.
    """
    splits: list[Splitter] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        ctx = PassContext(config)
        Pipeline("pre_grad", PRE_GRAD).run(gm, ctx)
        split = splitter(config, ctx)
        compiled = interpret_planned(gm, inputs, split)
        diagnosis.require_fit(split, Proof.of(split, None))
        splits.append(split)
        return compiled

    with FakeTensorMode(allow_non_fake_inputs=True):
        with no_truncated_normals(), _ReadableSteps():
            model, inputs = make()
        forward = model.forward if isinstance(model, nn.Module) else model
        # Code that models share is compiled anew by every call, which is not what a limit is for.
        unlimited = dynamo_config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)
        try:
            with unlimited:
                torch.compile(forward, backend=backend, dynamic=False)(**inputs)
        except BackendCompilerFailed as error:
            if error.inner_exception is not None:
                raise error.inner_exception from None
            raise
    return splits


class _ReadableSteps(TorchFunctionMode):
    """While a model is made, steps from one number to another are numbers that can be read.

    Models take rates of their layers from ``torch.linspace``; a fake tensor could not say them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is torch.linspace:
            read.append(func(*args, **kwargs))
        elif any(isinstance(x, FakeTensor) for x in read):
            read = []
        if read and all(x.device.type == "cpu" and x.numel() <= _READ for x in read):
            with disable_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Advice:
    """The largest size that fits.

    Attributes:
        size: of what was asked for; 0 where not even 1 fits.
        report: the plan for it; None where there is none.
    """

    size: int
    report: Report | None


def advise(
    make: Make,
    *,
    device: str,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
    most: int = 2**20,
    multiple: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Advice:
    """The largest batch, or sequence, that fits under a budget on a device.

    Args:
        make: as for `plan_for`, of one argument, the size.
        device: as for `plan_for`.
        options: as for `plan_for`; they must hold a ``memory_budget`` in bytes.
        mode: as for `plan_for`.
        most: sizes beyond are not tried.
        multiple: sizes are multiples of it.
        say: called with a line for every size that is tried.

    Raises:
        ConfigError: an option is unknown or impossible, or there is no budget in bytes.
    """
    config = read_options({**(options or {}), "device": device}, mode=mode)
    if config.memory_budget.kind != "bytes":
        raise ConfigError(
            f"memory_budget is {config.memory_budget}: to advise takes a number of bytes, such "
            f"as '70GiB'"
        )

    def fitting(count: int) -> Report | None:
        size = count * multiple
        try:
            report = plan_for(lambda: make(size), device=device, options=options, mode=mode)
        except BudgetInfeasibleError as error:
            say(f"{size}: needs {error.floor_bytes} bytes at least")
            return None
        say(f"{size}: fits, with {report.predicted_peak_bytes} bytes")
        return report

    low, high, best = 0, 1, None
    last = max(1, most // multiple)
    while high <= last and (report := fitting(high)):
        low, high, best = high, 2 * high, report
    high = min(high, last + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if report := fitting(middle):
            low, best = middle, report
        else:
            high = middle
    return Advice(low * multiple, best)
