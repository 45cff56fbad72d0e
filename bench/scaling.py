"""FSDP2 on 8 to 1,024 GPUs, computed: memory of each, and seconds of a step, by block's plan.

Nothing runs. The graph of one block, and that of head and loss, are planned on fake tensors as
`memopt.plan_for` does; the planner's own bytes and seconds of them go into the formulas below,
which a reader can check by hand. Every rank has the same batch, so all are alike.

Sources: sharded parameters, gathered block by block, are those of ZeRO's third stage (Rajbhandari
et al., 2020, arXiv:1910.02054) and of FSDP (Zhao et al., 2023, arXiv:2304.11277); the time of a
ring is that of Patarasuk and Yuan (2009).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.plan_cases import STOCK
from memopt.backend import read_options
from memopt.device import DEVICES, DeviceSpec
from memopt.outcome import Outcome
from memopt.planner.problem import Candidate, Problem
from memopt.planning import plan_with

CASE = "scaling"
DEVICE = "h100"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Of a rank's memory, what the driver, the collectives' buffers and the allocator's gaps leave.
USABLE = 0.92
WAYS = ("stock", "checkpoint", "memopt")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """What joins the ranks: nodes of GPUs, all to all within, one network card to each GPU.

    Attributes:
        node: GPUs of a node.
        inner: bytes per second that a GPU sends within its node.
        outer: bytes per second of a GPU's network card.
        inner_hop_seconds, outer_hop_seconds: of a message's start, within and between nodes.
    """

    node: int = 8
    inner: float = 450e9
    outer: float = 50e9
    inner_hop_seconds: float = 1e-6
    outer_hop_seconds: float = 5e-6

    def ring_seconds(self, nbytes: float, ranks: int) -> float:
        """Time of an all-gather to, or a reduce-scatter of, ``nbytes`` over a ring.

        Each rank passes on all but its own share, one share a hop. Between nodes every card
        carries a part of the ring's traffic, so a node has the bandwidth of all its cards.
        """
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.node)
        bandwidth = self.inner if nodes == 1 else min(self.inner, self.node * self.outer)
        outer_hops = nodes if nodes > 1 else 0
        hops = (ranks - 1 - outer_hops) * self.inner_hop_seconds
        hops += outer_hops * self.outer_hop_seconds
        return nbytes * (ranks - 1) / ranks / bandwidth + hops


@dataclass(frozen=True, kw_only=True)
class Part:
    """Head and loss, or a block under one plan, on one rank.

    Attributes:
        parameters: how many.
        peak_bytes: the planner's, gradients of it and, of blocks, what all others hold included.
        held_bytes: what it leaves for its backward and for what follows, all of a kind together.
        forward_seconds, backward_seconds: the planner's, recomputation included.
    """

    parameters: int
    peak_bytes: int
    held_bytes: int
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and in which types.

    Attributes:
        blocks: how many.
        embedding: parameters that are in no block and not in the head.
        width_bytes: of a gathered parameter.
        reduced_bytes: of a gradient when it is reduced.
        state_bytes: of a parameter, its gradient and the optimizer's state, where they are
            sharded: float32 each, and two moments of AdamW.
    """

    blocks: int
    embedding: int
    width_bytes: int = 2
    reduced_bytes: int = 4
    state_bytes: int = 16

    def sharded_bytes(self, block: Part, head: Part, ranks: int) -> float:
        """What a rank holds for good."""
        parameters = self.blocks * block.parameters + head.parameters + self.embedding
        return self.state_bytes * parameters / ranks

    def gathered_bytes(self, block: Part, head: Part) -> int:
        """Whole parameters: of two blocks, the next on its way; and of what is in no block."""
        return self.width_bytes * (2 * block.parameters + head.parameters + self.embedding)

    def reduced_block_bytes(self, block: Part) -> int:
        """A block's gradients on their way, while those of the next one are made."""
        return self.reduced_bytes * block.parameters

    def around_bytes(self, block: Part, head: Part, ranks: int) -> float:
        """All of a rank's bytes that are no graph's."""
        return (
            self.sharded_bytes(block, head, ranks)
            + self.gathered_bytes(block, head)
            + self.reduced_block_bytes(block)
        )

    def rank_bytes(self, block: Part, head: Part, ranks: int) -> float:
        """Peak of a rank: in a block's backward, or in the head with what all blocks hold."""
        graphs = max(block.peak_bytes, head.peak_bytes + block.held_bytes)
        return self.around_bytes(block, head, ranks) + graphs

    def step_seconds(self, block: Part, head: Part, ranks: int, fabric: Fabric) -> float:
        """Forward and backward of all blocks, each beside the collectives of its neighbours.

        Not beside anything: the first gathers, of what is in no block and of the first block, and
        the last reduction. In the backward a block's parameters are gathered and another's
        gradients reduced, one after the other on the same links.
        """
        rest = head.parameters + self.embedding
        gather = fabric.ring_seconds(self.width_bytes * block.parameters, ranks)
        reduce = fabric.ring_seconds(self.reduced_bytes * block.parameters, ranks)
        first = fabric.ring_seconds(self.width_bytes * rest, ranks) + gather
        last = reduce + fabric.ring_seconds(self.reduced_bytes * rest, ranks)
        forward = self.blocks * max(block.forward_seconds, gather)
        backward = self.blocks * max(block.backward_seconds, gather + reduce)
        return first + forward + head.forward_seconds + head.backward_seconds + backward + last


@dataclass(frozen=True)
class Model:
    """A Llama of `transformers`, and the batch of one rank."""

    name: str
    shape: Mapping[str, int]
    batch: int
    length: int


LLAMAS = (
    Model(
        "Llama-3-8B",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        },
        batch=2,
        length=8192,
    ),
    Model(
        "Llama-3-70B",
        {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        },
        batch=1,
        length=8192,
    ),
)  # fmt: skip


class _Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y: Tensor = self.layer(x, position_embeddings=(cos, sin))
        return y


class _Head(nn.Module):
    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _planned(make: Callable[[], Any], options: Mapping[str, Any]) -> Outcome:
    """The outcome of the one graph that a part of a model is."""
    splits = plan_with(make, read_options({"device": DEVICE, **options}))
    (outcome,) = (outcome for split in splits for outcome in split.outcomes)
    return outcome


def _blocks(model: Model, options: Mapping[str, Any]) -> tuple[Outcome, int]:
    """Planned as one of as many as there are, and the parameters of one."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    count = 0

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        nonlocal count
        config = LlamaConfig(**model.shape, use_cache=False, attn_implementation="sdpa")
        block = _Block(LlamaDecoderLayer(config, 0)).to(torch.bfloat16)
        count = sum(p.numel() for p in block.parameters())
        hidden = model.shape["hidden_size"]
        width = hidden // model.shape["num_attention_heads"]
        x = torch.zeros(model.batch, model.length, hidden, dtype=torch.bfloat16)
        angles = torch.zeros(1, model.length, width, dtype=torch.bfloat16)
        return block, {"x": x.requires_grad_(), "cos": angles, "sin": angles.clone()}

    return _planned(make, {"repeats": model.shape["num_hidden_layers"], **options}), count


def _head(model: Model, options: Mapping[str, Any]) -> Part:
    hidden, vocabulary = model.shape["hidden_size"], model.shape["vocab_size"]

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        x = torch.zeros(model.batch, model.length, hidden, dtype=torch.bfloat16)
        targets = torch.zeros(model.batch, model.length, dtype=torch.long)
        head = _Head(hidden, vocabulary).to(torch.bfloat16)
        return head, {"x": x.requires_grad_(), "targets": targets}

    outcome = _planned(make, options)
    return part(outcome.problem, outcome.chosen, (vocabulary + 1) * hidden)


def part(problem: Problem, plan: Candidate, parameters: int) -> Part:
    """What the planner says of a plan."""
    schedule, liveness = plan.liveness.schedule, plan.liveness
    forward = sum(problem.seconds[i] for i in schedule.forward)
    return Part(
        parameters=parameters,
        peak_bytes=plan.peak_bytes,
        held_bytes=problem.repeats * (liveness.saved_bytes + liveness.output_bytes),
        forward_seconds=forward,
        backward_seconds=problem.step_seconds(plan) - forward,
    )


def run(
    say: Callable[[str], None], models: Sequence[Model] = LLAMAS, ranks: Sequence[int] = RANKS
) -> list[Row]:
    """Rows of kind ``scaling``: each model, way and number of ranks.

    Args:
        say: called with one line per row.
        models: what is trained.
        ranks: how many, in turn.
    """
    rows = []
    for model in models:
        stock, parameters = _blocks(model, STOCK)
        ours, _ = _blocks(model, {"memory_budget": "min"})
        heads = {"stock": _head(model, STOCK), "memopt": _head(model, {})}
        training = Training(
            blocks=model.shape["num_hidden_layers"],
            embedding=model.shape["vocab_size"] * model.shape["hidden_size"],
        )
        for count in ranks:
            for way in WAYS:
                rows.append(_row(model, way, count, training, stock, ours, parameters, heads))
                say(f"{CASE}: {rows[-1]}")
    return rows


def _row(
    model: Model,
    way: str,
    ranks: int,
    training: Training,
    stock: Outcome,
    ours: Outcome,
    parameters: int,
    heads: Mapping[str, Part],
) -> Row:
    device: DeviceSpec = DEVICES[DEVICE]
    room = USABLE * device.memory_bytes
    head = heads["memopt" if way == "memopt" else "stock"]
    outcome = ours if way == "memopt" else stock
    problem, search = outcome.problem, outcome.search
    if way == "stock":
        plan: Candidate | None = search.fastest
    elif way == "checkpoint":
        plan = problem.evaluate((), "checkpoint")
    else:
        around = training.around_bytes(part(problem, search.fastest, parameters), head, ranks)
        plan = search.plan(int(room - around))
    own = {"kind": CASE, "case": model.name, "peer": way, "ranks": ranks, "planned_for": DEVICE}
    shown = part(problem, plan or search.floor, parameters)
    total = training.rank_bytes(shown, head, ranks)
    seconds = training.step_seconds(shown, head, ranks, Fabric())
    return own | {
        "batch": model.batch,
        "length": model.length,
        "fits": total <= room,
        "rank_bytes": int(total),
        "sharded_bytes": int(training.sharded_bytes(shown, head, ranks)),
        "gathered_bytes": training.gathered_bytes(shown, head),
        "graph_bytes": int(total - training.around_bytes(shown, head, ranks)),
        "recompute_seconds": training.blocks * (plan or search.floor).recompute_seconds,
        "step_seconds": seconds,
        "tokens_per_second": ranks * model.batch * model.length / seconds,
    }
