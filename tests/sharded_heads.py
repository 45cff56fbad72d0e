"""Losses on logits whose classes are shared out over ranks, by eager and by memopt."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

from bench.meter import Meter
from memopt.backend import compile_graph, read_options
from memopt.record import GraphRecord
from tests.passes.compiling import options
from tests.references import assert_within_reference_error

BATCH, LENGTH, WIDTH, CHUNK_ROWS = 2, 96, 16, 16
IGNORED = 7


def mean(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def total_of_some(z: Tensor, y: Tensor) -> Tensor:
    z = z.view(-1, z.shape[-1])
    return F.cross_entropy(z, y.flatten(), ignore_index=IGNORED, reduction="sum")


def weighted(z: Tensor, y: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2, z.shape[-1], dtype=z.dtype)
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), weight, ignore_index=IGNORED)


def capped_and_shifted(z: Tensor, y: Tensor) -> Tensor:
    z = 3.0 * torch.tanh(z[:, :-1] / 3.0)
    return F.cross_entropy(z.transpose(1, 2), y[:, 1:], reduction="none").square().mean()


def with_z_loss(z: Tensor, y: Tensor) -> Tensor:
    return mean(z, y) + 1e-2 * torch.logsumexp(z, -1).square().mean()


def log_probabilities(z: Tensor, y: Tensor) -> Tensor:
    picked = F.log_softmax(z, -1).gather(-1, y[..., None])[..., 0]
    return -(picked.sum(-1) / 10).sigmoid().log().mean()


def numbered_from_behind(z: Tensor, y: Tensor) -> Tensor:
    z, y = z.flatten(0, 1), y.flatten()
    y = torch.where(y % 2 == 0, y, y - z.shape[-1])
    return -z[torch.arange(len(y)), y].mean() + torch.logsumexp(z, -1).mean()


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1)


def normalised_by_hand(z: Tensor, y: Tensor) -> Tensor:
    return (z.exp().sum(-1).log() - z.gather(-1, y[..., None])[..., 0]).mean()


@dataclass(frozen=True)
class Layout:
    """A head that is cut by classes.

    Attributes:
        loss: of logits and targets.
        gathered: whether each rank gets the logits of all classes, or DTensor has them in parts.
        rows: whether each rank has a part of the sequence before the head.
        bias: whether the head has one.
        classes: how many.
        returned: whether the logits are returned as well.
        labels: whether the targets are a DTensor, too.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    gathered: bool = True
    rows: bool = False
    bias: bool = False
    classes: int = 1024
    returned: bool = False
    labels: bool = False


class Head(nn.Module):
    """Gives its loss, and logits where they are asked for."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.head = nn.Linear(WIDTH, layout.classes, bias=layout.bias)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = self.head(x.sin())
        loss = self.layout.loss(z, y)
        return (loss, z) if self.layout.returned else loss


@dataclass
class Step:
    """A step of training of a head on this rank, the same numbers each time.

    Attributes:
        layout: of the head.
        dtype: of weights and hidden states.
    """

    layout: Layout
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        layout = self.layout
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        self.model = Head(layout).to(self.dtype)
        x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64).to(self.dtype)
        self.y = torch.randint(layout.classes, (BATCH, LENGTH))
        self.y[:, ::5] = IGNORED
        if layout.labels:
            self.y = DTensor.from_local(self.y, mesh, (Replicate(),))
        between = Shard(1) if layout.rows else Replicate()
        plan = ColwiseParallel(
            input_layouts=between,
            output_layouts=Replicate() if layout.gathered else Shard(-1),
            use_local_output=layout.gathered,
        )
        parallelize_module(self.model, mesh, {"head": plan})
        if layout.rows:
            x = x.chunk(mesh.size(), 1)[mesh.get_local_rank()]
        self.x = x.contiguous().requires_grad_()

    def __call__(self, run: Callable[[Tensor, Tensor], Any]) -> list[Tensor]:
        """Loss and gradients."""
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None
        with nullcontext() if self.layout.gathered else loss_parallel():
            loss = run(self.x, self.y)
            loss = loss[0] if self.layout.returned else loss
            loss.backward()
        results = [loss, self.x.grad, *(p.grad for p in self.model.parameters())]
        return [r.full_tensor() if isinstance(r, DTensor) else r.detach() for r in results]

    def compiled(self, records: list[GraphRecord], **chunk: Any) -> Callable[..., Any]:
        """The model by memopt; ``chunk`` is options of the pass."""
        torch._dynamo.reset()
        config = read_options(options(**{"chunk_rows": CHUNK_ROWS, **chunk}))

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            return compile_graph(gm, inputs, config, records.append)

        return torch.compile(self.model, backend=backend, dynamic=False)


def assert_chunked(layouts: Mapping[str, Layout]) -> None:
    """Loss and gradients are eager's, and no logits of the rank's classes exist."""
    world = torch.distributed.get_world_size()
    for name, layout in layouts.items():
        records: list[GraphRecord] = []
        step = Step(layout)
        run = step.compiled(records)
        for own, eager in zip(step(run), step(step.model), strict=True):
            torch.testing.assert_close(own, eager, rtol=1e-11, atol=1e-14, msg=name)
        (record,) = records
        assert record.rewrites["chunk_losses"] == 1, (name, record.remarks)
        with Meter() as meter:
            step(run)
        logits_bytes = BATCH * LENGTH * layout.classes // world * step.dtype.itemsize
        assert max(meter.peak_bytes, record.predicted_peak_bytes) < logits_bytes, name


def assert_rounds_as_eager(layout: Layout, dtype: torch.dtype) -> None:
    """The error of loss and gradients in low precision is eager's or less."""
    step, low = Step(layout), Step(layout, dtype)
    step.model.load_state_dict(low.model.state_dict())
    step.x.data.copy_(low.x.data)
    records: list[GraphRecord] = []
    own = low(low.compiled(records))
    assert records[0].rewrites["chunk_losses"] == 1
    assert_within_reference_error(own, step(step.model), low(low.model))


def remarks_of(layouts: Sequence[Layout], logits: str = "lazy") -> list[str]:
    """What the pass says of each head; loss and gradients are eager's in any case."""
    said = []
    for layout in layouts:
        records: list[GraphRecord] = []
        step = Step(layout)
        own, eager = step(step.compiled(records, logits=logits)), step(step.model)
        torch.testing.assert_close(own, eager, rtol=1e-11, atol=1e-14)
        (text,) = (r.text for r in records[0].remarks if r.pass_name == "chunk_losses")
        said.append(text)
    return said


def error_of_a_class_that_no_rank_has(layout: Layout) -> str:
    """The message of a target that is out of range."""
    step = Step(layout)
    step.y[0, 0] = layout.classes
    try:
        step(step.compiled([]))
    except IndexError as error:
        return str(error)
    return ""
