"""Functions over rows that Inductor does not make one kernel of, and how they become one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from memopt.device import DEVICES, DeviceSpec
from memopt.kernels.region import REGION
from memopt.rows.lowering import LoweredRows, lower_rows
from memopt.rows.select import choose_regions

prims = torch.ops.prims
DROPPED = 0.25
Function = Callable[..., tuple[Tensor, ...]]
Trace = Callable[[Function, Sequence[Any]], fx.GraphModule]


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_norm_quantise(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """A sum, its RMS norm, and a copy of ``x`` in int8 with a scale for each row."""
    total = x + residual
    z = wide(total)
    y = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6) * wide(weight)
    scale = wide(x).abs().amax(-1, keepdim=True) / 127
    return total, y.to(x.dtype), torch.round(wide(x) / scale).to(torch.int8), scale


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Both gradients and the product once more, from what went into the gate."""
    g, u, d = map(wide, (gate, up, grad))
    share = torch.sigmoid(g)
    silu = g * share
    results = d * u * share * (1 + g * (1 - share)), d * silu, silu * u
    return tuple(result.to(gate.dtype) for result in results)


def bits(mask: Tensor) -> Tensor:
    """Eight neighbours of a row in a byte."""
    places = torch.arange(8, dtype=torch.uint8)
    octets = mask.reshape(*mask.shape[:-1], mask.shape[-1] // 8, 8).to(torch.uint8)
    return (octets << places).sum(-1, dtype=torch.uint8)


def mask_of(packed: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8)
    octets = (packed.unsqueeze(-1) >> places) & 1
    return octets.reshape(*packed.shape[:-1], 8 * packed.shape[-1]) != 0


def dropout(x: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    """Dropout, and which entries it keeps, as bits."""
    drawn = prims.inductor_random(list(x.shape), prims.inductor_lookup_seed(seeds, 1), "rand")
    keep = drawn >= DROPPED
    return x * keep * (1 / (1 - DROPPED)), bits(keep)


def dropout_backward(grad: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
    return (grad * mask_of(packed) * (1 / (1 - DROPPED)),)


def quantise_groups(x: Tensor) -> tuple[Tensor, ...]:
    """In int8, with a scale for every 32 neighbours of a row."""
    groups = wide(x).reshape(*x.shape[:-1], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return torch.round(groups / scale).to(torch.int8).flatten(-2), scale.squeeze(-1)


def traced(function: Function, inputs: Sequence[Any]) -> fx.GraphModule:
    """The aten graph of a function, without what nothing reads."""
    gm: fx.GraphModule = make_fx(function, tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def traced_for_any_rows(function: Function, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The same, where all sizes but the last one may vary."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(x: Tensor) -> Tensor:
        dims = [DimDynamic.DYNAMIC] * (x.dim() - 1) + [DimDynamic.STATIC]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))

    with mode:
        gm: fx.GraphModule = make_fx(function)(*map(fake, inputs))
    return gm


def lowered(
    function: Function,
    inputs: Sequence[Any],
    trace: Trace = traced,
    device: DeviceSpec = DEVICES["h100"],
) -> LoweredRows:
    """The only region of a function's graph."""
    (region,) = choose_regions(trace(function, inputs).graph)
    return lower_rows(region, device)


def read(region: LoweredRows, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of the inputs of the region's graph, those of the region, in its order."""
    placeholders = region.results[0].graph.find_nodes(op="placeholder")
    return [inputs[placeholders.index(node)] for node in region.inputs]


def returned(region: LoweredRows, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results in the order and the shapes in which the region's graph returns them."""
    (output,) = region.results[0].graph.find_nodes(op="output")
    found = []
    for node in output.args[0]:
        base = node
        while base not in region.results:
            base = base.args[0]
        found.append(results[region.results.index(base)].reshape(node.meta["val"].shape))
    return tuple(found)


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of regions in a graph."""
    return list(gm.graph.find_nodes(op="call_function", target=REGION))
