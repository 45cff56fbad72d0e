"""Uses of logits: which stay lazy, which hold a chunk at a time, and which need them whole."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from memopt._torch import pytree
from memopt.lazy.logits import LazyLogits

B, S, H, V = 2, 5, 4, 7
Inputs = list[torch.Tensor]
Use = Callable[[Any], Any]
LABELS = torch.arange(B * S).reshape(B, S) % V
MASK = LABELS % 2 == 0


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, S, H), (V, H), (V,)]
    made = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    return [t.to(dtype).requires_grad_(grad) for t in made]


def both(**options: Any) -> tuple[LazyLogits, torch.Tensor, Inputs]:
    """Lazy logits, what eager has in their place, and what both are made of."""
    made = inputs(**options)
    return LazyLogits(*made), F.linear(*made), made


def assert_same(actual: Any, expected: Any, made: Inputs) -> None:
    """Values, dtypes, shapes, and gradients with respect to hidden state, weight and bias."""
    pairs = list(zip(leaves(actual), leaves(expected), strict=True))
    assert pairs
    for a, e in pairs:
        assert isinstance(a, torch.Tensor) == isinstance(e, torch.Tensor)
        if not isinstance(e, torch.Tensor):
            assert a == e
            continue
        assert (a.shape, a.dtype, a.requires_grad) == (e.shape, e.dtype, e.requires_grad)
        torch.testing.assert_close(a, e)
        if e.requires_grad:
            upstream = torch.linspace(-1, 2, e.numel(), dtype=e.dtype).reshape(e.shape)
            torch.testing.assert_close(
                torch.autograd.grad(a, made, upstream, retain_graph=True),
                torch.autograd.grad(e, made, upstream, retain_graph=True),
            )


def leaves(x: Any) -> list[Any]:
    return list(pytree.tree_leaves(x))


STAY: dict[str, Use] = {
    "itself": lambda x: x,
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to dtype": lambda x: x.to(torch.float32),
    "to device and dtype": lambda x: x.to("cpu", torch.float32),
    "to another": lambda x: x.to(torch.zeros(1)),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(torch.zeros(1)),
    "cpu": lambda x: x.cpu(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "view": lambda x: x.view(-1, V),
    "view of three": lambda x: x.view(B, 1, S, -1),
    "reshape": lambda x: x.reshape(B * S, V),
    "flatten": lambda x: x.flatten(0, 1),
    "torch.flatten": lambda x: torch.flatten(x, end_dim=1),
    "unflatten": lambda x: x.unflatten(0, (1, B)),
    "squeeze": lambda x: x[:1].squeeze(0),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "shift": lambda x: x[:, :-1],
    "shift with dots": lambda x: x[..., :-1, :],
    "shift and flatten": lambda x: x[..., :-1, :].contiguous().view(-1, V),
    "reshape of a shift": lambda x: x[:, 1:].reshape(-1, V),
    "row": lambda x: x[0],
    "last position": lambda x: x[:, -1],
    "one position": lambda x: x[1, 2],
    "last position, all": lambda x: x[:, -1, :],
    "new dimension": lambda x: x[:, None],
    "new dimension and dots": lambda x: x[None, ..., 1:3, :],
    "steps": lambda x: x[::2, 1::3],
    "mask": lambda x: x[MASK],
    "mask and slice": lambda x: x[MASK, :3],
    "mask of rows": lambda x: x[torch.tensor([False, True])],
    "index": lambda x: x[torch.tensor([1, 0, 1])],
    "two indices": lambda x: x[torch.tensor([0, 1]), torch.tensor([3, 4])],
    "index, apart": lambda x: x[:, torch.tensor([[0, 4]])],
    "vocabulary": lambda x: x[..., :3],
    "vocabulary and rows": lambda x: x[1:, -1, 2:6:2],
    "no vocabulary": lambda x: x[..., :0],
    "select": lambda x: x.select(1, 2),
    "narrow": lambda x: x.narrow(1, 1, 3),
    "split": lambda x: x.split(2, dim=1),
    "torch.split": lambda x: torch.split(x, [1, 4], dim=1),
    "chunk": lambda x: x.chunk(2),
    "unbind": lambda x: x.unbind(1),
    "iteration": list,
    "exp": lambda x: x.exp(),
    "temperature": lambda x: x / 0.7,
    "number times": lambda x: 2 * x,
    "negative": lambda x: -x,
    "softmax": lambda x: F.softmax(x, dim=-1),
    "softmax in fp32": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "log_softmax": lambda x: x.log_softmax(2),
    "rows of log_softmax": lambda x: x.log_softmax(-1)[:, 1:].flatten(0, 1),
}
REDUCE: dict[str, Use] = {
    "argmax": lambda x: x.argmax(-1),
    "argmax, numpy's way": lambda x: x.argmax(axis=-1),
    "argmax of a shift": lambda x: x[..., :-1, :].contiguous().argmax(dim=-1),
    "torch.argmax": lambda x: torch.argmax(x, dim=2, keepdim=True),
    "argmax of a row": lambda x: x[0, 0].argmax(-1),
    "argmax of nothing": lambda x: x[:, :0].argmax(-1),
    "max": lambda x: tuple(x.max(-1)),
    "min": lambda x: tuple(torch.min(x, dim=-1)),
    "amax": lambda x: x.amax(dim=(-1,)),
    "topk": lambda x: tuple(x.topk(3)),
    "topk of a row": lambda x: tuple(torch.topk(x[1], 2, dim=-1, largest=False)),
    "logsumexp": lambda x: torch.logsumexp(x, dim=-1),
    "logsumexp kept": lambda x: x.logsumexp(-1, keepdim=True),
    "sum": lambda x: x.sum(-1),
    "sum of some": lambda x: x[..., 2:5].sum(-1),
    "gather": lambda x: torch.gather(x, -1, LABELS.unsqueeze(-1)).squeeze(-1),
    "gather by name": lambda x: x.gather(dim=-1, index=LABELS.unsqueeze(-1)),
    "gather nothing": lambda x: x.gather(-1, LABELS.unsqueeze(-1)[..., :0]),
    "log-probability": lambda x: F.log_softmax(x, -1).gather(-1, LABELS[..., None]),
    "entropy": lambda x: entropy(x),
    "selected log-probability": lambda x: selected(x, LABELS),
    "smoothed loss": lambda x: (-F.log_softmax(x, dim=-1)).sum(dim=-1, keepdim=True),
}
WHOLE: dict[str, Use] = {
    "plus": lambda x: x + 1,
    "times a tensor": lambda x: x * torch.ones(V, dtype=x.dtype),
    "equal": lambda x: x == x,
    "cross entropy": lambda x: F.cross_entropy(x.view(-1, V), LABELS.flatten()),
    "all": lambda x: x.sum(),
    "mean": lambda x: x.mean(-1),
    "argmax over rows": lambda x: x.argmax(1),
    "softmax over rows": lambda x: x.softmax(1),
    "transpose": lambda x: x.transpose(0, 1),
    "mT": lambda x: x.mT,
    "data": lambda x: x.data,
    "view with other columns": lambda x: x.view(B, -1),
    "view as bits": lambda x: x.detach().view(torch.int16),
    "split of columns": lambda x: x.split(3, dim=-1),
    "entry": lambda x: x[..., 2],
    "entries": lambda x: x[:, -1, [1, 3]],
    "column after": lambda x: x[..., None],
    "slice of a distribution": lambda x: x.softmax(-1)[..., :3],
    "long": lambda x: x.long(),
    "zeros_like": torch.zeros_like,
    "cat": lambda x: torch.cat([x, torch.zeros_like(x)]),
    "stack": lambda x: torch.stack((x, x)),
    "matmul": lambda x: x @ torch.ones(V, dtype=x.dtype),
    "einsum": lambda x: torch.einsum("bsv->vs", x),
    "list": lambda x: x.tolist(),
    "item": lambda x: x[0, 0, 0].item(),
    "truth": lambda x: bool(x[0, 0, 0] > 0),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[1, 1], indexing="ij"),
    "maximum with": lambda x: torch.max(x, torch.zeros(V, dtype=x.dtype)),
    "product with its detached self": lambda x: x * x.softmax(-1).detach(),
}

EVERY = {**STAY, **REDUCE, **WHOLE}


def entropy(logits: Any, chunk: int = 3) -> torch.Tensor:
    """As trainers log it."""
    parts = []
    for rows in logits.reshape(-1, logits.shape[-1]).split(chunk, dim=0):
        log_p = F.log_softmax(rows, dim=-1)
        parts.append(-(torch.exp(log_p) * log_p).sum(-1))
    return torch.cat(parts).reshape(logits.shape[:-1])


def selected(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """As trainers of preferences take the labels' log-probabilities."""
    if logits.dtype in (torch.float32, torch.float64):
        chosen = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
        return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    rows = [
        F.log_softmax(row, dim=-1).gather(dim=-1, index=i.unsqueeze(-1)).squeeze(-1)
        for row, i in zip(logits, index, strict=True)
    ]
    return torch.stack(rows)


class Square(torch.autograd.Function):
    """A custom function reaches C++ without asking ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * gradients[0]


def square(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = Square.apply(x)  # type: ignore[no-untyped-call]
    return result
