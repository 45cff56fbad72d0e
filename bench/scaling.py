"""FSDP2 on 8 to 1,024 GPUs, computed: memory of each, and seconds of a step, by block's plan.

Nothing runs. The graph of one block, and that of head and loss, are planned on fake tensors as
`memopt.plan_for` does; the planner's own bytes and seconds of them go into the formulas of
`bench.sharding`. Every rank has the same batch, so all are alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.plan_cases import STOCK
from bench.sharding import Fabric, Part, Training
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
_TIGHTENED = 6
WAYS = ("stock", "checkpoint", "memopt")
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A Llama of `transformers`, and the batch of one rank."""

    name: str
    shape: Mapping[str, int]
    batch: int
    length: int


def _llama(name: str, *, hidden: int, inner: int, blocks: int, heads: int, batch: int) -> Model:
    """One of version 3, whose sizes have the rest in common."""
    shape = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    return Model(name, shape, batch, length=8192)


LLAMAS = (
    _llama("Llama-3-8B", hidden=4096, inner=14336, blocks=32, heads=32, batch=2),
    _llama("Llama-3-70B", hidden=8192, inner=28672, blocks=80, heads=64, batch=1),
)


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


@contextmanager
def _in_bfloat16() -> Iterator[None]:
    """Modules are made of bfloat16: fake ones cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
        with _in_bfloat16():
            block = _Block(LlamaDecoderLayer(config, 0))
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
        with _in_bfloat16():
            head = _Head(hidden, vocabulary)
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


def _fitting(
    outcome: Outcome, training: Training, parameters: int, head: Part, ranks: int, room: float
) -> Candidate | None:
    """The fastest plan found with which a rank has room for its blocks, and for the head."""
    fastest = part(outcome.problem, outcome.search.fastest, parameters)
    budget = room - training.around_bytes(fastest, head, ranks)
    for _ in range(_TIGHTENED):
        plan = outcome.search.plan(int(budget))
        if plan is None:
            return None
        own = part(outcome.problem, plan, parameters)
        over = training.rank_bytes(own, head, ranks) - room
        if over <= 0:
            return plan
        budget = min(budget, plan.peak_bytes) - over
    return None


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
        plan = _fitting(outcome, training, parameters, head, ranks, room)
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
