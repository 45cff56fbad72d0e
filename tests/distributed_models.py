"""A small decoder, its ways to be distributed, and some steps of training on each rank."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


@dataclass(frozen=True)
class Layout:
    """How a model is distributed.

    Attributes:
        kind: ``"ddp"``, ``"fsdp"``, ``"tp"``, or ``"fsdp+tp"`` on a square of ranks.
        blocks: whether each block is compiled, before it is sharded, or all at once.
        rows: as for `parallelise`.
        classes: as for `parallelise`.
        ragged: whether the second rank has longer sequences, and other tokens, than the first.
    """

    kind: str
    blocks: bool = False
    rows: bool = False
    classes: bool = False
    ragged: bool = False


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
        shard(model, square["data"])
    return model, model if layout.blocks else compiled(model)


def tokens_of(step: int, layout: Layout, rank: int) -> Tensor:
    """The batch of a step: with tensor parallelism the same for ranks that share one."""
    data = {"tp": 0, "fsdp+tp": rank // 2}.get(layout.kind, rank)
    generator = torch.Generator().manual_seed(100 * step + data)
    length = 48 if layout.ragged and data else 32
    return torch.randint(VOCABULARY, (2, length), generator=generator)


def train(
    layout: Layout, options: Mapping[str, object] | None, steps: int = 2
) -> tuple[list[float], list[Tensor]]:
    """Losses of some steps, and the gradients of the last; without options by eager.

    Args:
        layout: how.
        options: for memopt.
        steps: of plain gradient descent.
    """

    def compiled(target: Any) -> Any:
        if options is None:
            return target
        own: Any = dict(options)
        return torch.compile(target, backend="memopt", options=own, dynamic=False)

    model, run = distributed(layout, compiled)
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
