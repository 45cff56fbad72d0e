"""Reads the peak of a step off the code that will run.

Inductor reorders, fuses and reuses buffers after planning, so the plan's own estimate is not a
proof. The emitted modules are: they are replayed with every kernel replaced by nothing, and each
storage is counted from its allocation to its release. The forward's results feed the backward as
they do at run time, in the same order.

Nothing is compiled, launched or allocated. Works on code from the compile cache as well.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memopt._torch import FakeTensorMode
from memopt.memory.meter import StorageMeter, storage_key
from memopt.memory.replay import EmittedModule
from memopt.memory.timeline import Timeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificate:
    """What the emitted code allocates.

    Attributes:
        peak_bytes: highest live bytes above what was resident when the step began.
        saved_bytes: bytes alive across the boundary that are no forward output.
        timeline: the emitted schedule, kernel by kernel.
    """

    peak_bytes: int
    saved_bytes: int
    timeline: Timeline


def certify(codes: Sequence[str], *, granularity: int = 1) -> Certificate | str:
    """Replay a forward, or a forward and its backward.

    Args:
        codes: source of the emitted modules, in the order of compilation.
        granularity: the allocator rounds each storage up to a multiple of this.

    Returns:
        The certificate, or the reason why the code cannot be replayed without running it: it
        reads a tensor's value, say, or is split into more than two modules.
    """
    if len(codes) not in (1, 2):
        return f"{len(codes)} emitted modules where 1 or 2 are expected"
    meter = StorageMeter(granularity)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            return _replay(codes, meter)
    except Exception as error:  # emitted code may use anything; an uncertified plan still runs
        log.debug("replay failed", exc_info=True)
        return f"the emitted code cannot be replayed: {type(error).__name__}: {error}"


def _replay(codes: Sequence[str], meter: StorageMeter) -> Certificate:
    """Run the forward, then the backward on what it returned; outputs stay held throughout."""
    forward = EmittedModule(codes[0], meter)
    results = list(forward.run(forward.arguments()))
    if len(codes) == 1:
        return Certificate(meter.peak_bytes, 0, meter.close())
    backward = EmittedModule(codes[1], meter)
    own = backward.arguments()
    tangents = [t for n, t in zip(backward.argument_names, own, strict=True) if "tangents" in n]
    received = len(own) - len(tangents)
    del own
    crossing = results[len(results) - received :]
    outputs = results[: len(results) - received]
    results.clear()
    held = {storage_key(t) for t in outputs if isinstance(t, torch.Tensor)}
    saved_bytes = sum(nbytes for key, nbytes in meter.live.items() if key not in held)
    meter.backward = True
    arguments = [*_as_the_backward_takes(crossing), *tangents]
    real = [t for t in tangents if isinstance(t, torch.Tensor)]  # a distributed one has its mesh
    for i in range(len(real)):  # no name of one may stay
        meter.allocate(real[i], "tangent")
    roots = [t for t in real if t.dim() == 0]  # as `Tensor.backward` holds them
    crossing.clear()
    tangents.clear()
    real.clear()
    gradients = backward.run(arguments)
    certificate = Certificate(meter.peak_bytes, saved_bytes, meter.close())
    del gradients, outputs, roots
    return certificate


def _as_the_backward_takes(crossing: Sequence[Any]) -> list[Any]:
    """Sizes first, then tensors, then what is neither, such as the mesh of distributed tensors."""
    sizes = [v for v in crossing if isinstance(v, (int, float))]
    tensors = [v for v in crossing if isinstance(v, torch.Tensor)]
    return [
        *sizes,
        *tensors,
        *(v for v in crossing if not isinstance(v, (int, float, torch.Tensor))),
    ]
