"""A small decoder, its ways to be distributed, and some steps of training on each rank."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from bench.meter import Meter
from memopt.backend import compile_graph, read_options
from memopt.record import GraphRecord

VOCABULARY, WIDTH, HEAD_WIDTH = 1024, 128, 32


class Block(nn.Module):
    """Attention and a gated layer, as Llama has them, of as many heads as its weights have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = (
            part(y).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.second_norm(x)
        gated: Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + gated


class Decoder(nn.Module):
    """Gives the loss of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


def replicate(model: Decoder) -> nn.Module:
    """DDP, with gradients in several buckets."""
    return DistributedDataParallel(model, bucket_cap_mb=1)


def shard(model: Decoder, mesh: DeviceMesh | None = None) -> None:
    """FSDP2, block by block, in place."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallelise(model: Decoder, mesh: DeviceMesh, *, rows: bool, classes: bool) -> Decoder:
    """Tensor parallelism, in place.

    Args:
        model: changed.
        mesh: of one dimension.
        rows: whether norms hold a part of the sequence each.
        classes: whether each rank holds the logits of a part of the vocabulary.
    """
    between = Shard(1) if rows else Replicate()
    into, out = ColwiseParallel(input_layouts=between), RowwiseParallel(output_layouts=between)
    own: dict[str, ParallelStyle] = {"norm": SequenceParallel()} if rows else {}
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(
            input_layouts=between,
            output_layouts=Shard(-1) if classes else Replicate(),
            use_local_output=not classes,
        ),
    }
    parallelize_module(model, mesh, plan | own)
    inner: dict[str, ParallelStyle] = dict.fromkeys(("query", "key", "value", "gate", "up"), into)
    inner |= {"out": out, "down": out}
    inner |= dict.fromkeys(("norm", "second_norm"), SequenceParallel()) if rows else {}
    for block in model.blocks:
        parallelize_module(block, mesh, inner)
    return model


class OfAllRows(torch.autograd.Function):
    """A product whose weight's gradient is of the rows of all ranks, gathered in the backward.

    The rows are no gradients: a compiler could gather them as soon as in the forward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        group = torch.distributed.group.WORLD
        assert group is not None
        rows, whole = (collectives.all_gather_tensor(each, 0, group) for each in (x, gradients[0]))
        return gradients[0] @ weight.t(), rows.sin().t() @ whole


def of_all_rows(x: Tensor, *weights: Tensor) -> Tensor:
    """A chain of such products."""
    for weight in weights:
        x = OfAllRows.apply(x, weight).tanh()  # type: ignore[no-untyped-call]
    return x.sum()


@dataclass(frozen=True)
class Layout:
    """How a model is distributed.

    Attributes:
        kind: ``"ddp"``, ``"fsdp"``, ``"tp"``, or ``"fsdp+tp"`` on a square of ranks.
        blocks: whether each block is compiled, before it is sharded, or all at once.
        rows: as for `parallelise`.
        classes: as for `parallelise`.
        ragged: whether the second rank has longer sequences, and other tokens, than the first.
        growing: whether it has so only from the second step on.
        length: of a sequence; longer ones have half as many tokens more.
    """

    kind: str
    blocks: bool = False
    rows: bool = False
    classes: bool = False
    ragged: bool = False
    growing: bool = False
    length: int = 32


def distributed(layout: Layout, compiled: Callable[[Any], Any]) -> tuple[nn.Module, Any]:
    """A model of float64 weights, the same on every rank before they are cut; and what runs it."""
    torch.manual_seed(0)
    world = torch.distributed.get_world_size()
    model = Decoder().double()
    if layout.blocks:
        for block in model.blocks:
            block.forward = compiled(block.forward)
    if layout.kind == "ddp":
        whole = replicate(model)
        return model, compiled(whole)
    if layout.kind == "fsdp":
        shard(model)
    elif layout.kind == "tp":
        mesh = init_device_mesh("cpu", (world,))
        parallelise(model, mesh, rows=layout.rows, classes=layout.classes)
    else:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelise(model, square["tensor"], rows=layout.rows, classes=layout.classes)
        # FSDP2's hooks break the graph behind the embedding, and torch 2.13 cannot trace one
        # whose result is a sum over ranks: its mask is kept from one graph to the next.
        model.embedding = torch.compiler.disable(model.embedding)  # type: ignore[no-untyped-call]
        shard(model, square["data"])
    return model, model if layout.blocks else compiled(model)


def tokens_of(step: int, layout: Layout, rank: int) -> Tensor:
    """The batch of a step: with tensor parallelism the same for ranks that share one."""
    data = {"tp": 0, "fsdp+tp": rank // 2}.get(layout.kind, rank)
    generator = torch.Generator().manual_seed(100 * step + data)
    longer = layout.ragged or (layout.growing and step > 0)
    length = layout.length * 3 // 2 if longer and data else layout.length
    return torch.randint(VOCABULARY, (2, length), generator=generator)


def compiled_with(
    options: Mapping[str, object] | str | None, records: list[GraphRecord] | None = None
) -> Callable[[Any], Any]:
    """What compiles a function by memopt; without options, what leaves it to eager.

    Args:
        options: for memopt, or the name of another backend.
        records: takes what is known of each graph.
    """
    if options is None:
        return lambda target: target
    if isinstance(options, str):
        return lambda target: torch.compile(target, backend=options, dynamic=False)
    config, known = read_options(options), [] if records is None else records

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, inputs, config, known.append)

    return lambda target: torch.compile(target, backend=backend, dynamic=False)


def saved_by(records: Sequence[GraphRecord]) -> list[set[str]]:
    """The names of what each graph saves."""
    return [set(record.plan.saved if record.plan else ()) for record in records]


def train(
    layout: Layout,
    options: Mapping[str, object] | str | None,
    records: list[GraphRecord] | None = None,
    steps: int = 2,
) -> tuple[list[float], list[Tensor]]:
    """Losses of some steps, and the gradients of the last; without options by eager.

    Args:
        layout: how.
        options: for memopt, or the name of another backend.
        records: takes what is known of each graph.
        steps: of plain gradient descent.
    """
    model, run = distributed(layout, compiled_with(options, records))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    losses, rank = [], torch.distributed.get_rank()
    for step in range(steps):
        optimizer.zero_grad()
        with loss_parallel() if layout.classes else nullcontext():
            loss = run(tokens_of(step, layout, rank))
            loss.backward()
        losses.append(_whole(loss).item())
        gradients = [_own(p.grad).clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return losses, gradients


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_step(
    blocks: int, batch: int, length: int, options: Mapping[str, object]
) -> tuple[int, int, int]:
    """A step of blocks under FSDP2, compiled one by one: what is measured and what was planned.

    Returns:
        The rank's peak in bytes, the planned one of the blocks, and parameters of a block.
    """
    torch.manual_seed(0)
    records: list[GraphRecord] = []
    config = read_options({**options, "repeats": blocks})

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, inputs, config, records.append)

    model = nn.Sequential(*(Block() for _ in range(blocks)))
    (parameters, *_) = (sum(p.numel() for p in block.parameters()) for block in model)
    for block in model:
        block.compile(backend=backend, dynamic=False)
        fully_shard(block)
    fully_shard(model)
    x = torch.randn(batch, length, WIDTH)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x.detach().requires_grad_()).sum().backward()

    for _ in range(2):
        step()
    model.zero_grad(set_to_none=True)
    with Meter() as meter:
        model(x.detach().requires_grad_()).sum().backward()
    (record,) = records
    return meter.peak_bytes, record.predicted_peak_bytes, parameters
