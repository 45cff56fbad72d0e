"""The calls of attention that a model makes while it runs, with the modules that make them.

Any model that calls ``F.scaled_dot_product_attention`` is seen, and none is patched: a mode of
torch sees the calls, and hooks that all modules share say which module runs.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as it happens.

    Attributes:
        name: of the module, with ``#i`` behind it from its second call on.
        arguments: by name.
        is_causal: whether every query sees the keys up to its own, of as many keys as queries.
        heads: of keys, before they were repeated for groups of queries.
    """

    name: str
    arguments: Mapping[str, Any]
    is_causal: bool
    heads: int

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, Hq, N, D)`, and keys and values `(B, Hk, N, D)`, each head once."""
        q, k, v = (self.arguments[name] for name in _ARGUMENTS[:3])
        step = k.shape[1] // self.heads
        return q, k[:, ::step], v[:, ::step]

    @property
    def scale(self) -> float:
        """Of the scores."""
        scale, query = self.arguments.get("scale"), self.arguments["query"]
        return float(scale) if scale is not None else 1.0 / math.sqrt(query.shape[-1])


Handler = Callable[[Call, Callable[[], Tensor]], Tensor]
"""Given a call, and what makes it, says what it returns."""


@contextmanager
def seen_calls(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Hand every call of attention that ``model`` makes to ``handler``, in order.

    Names count from the start of the block: open one for each run of the model.
    """
    names = {module: name for name, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            running.append(names[module])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if module in names:
            running.pop()

    handles = (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    )
    try:
        with torch.compiler.set_stance("force_eager"), _Calls(running, handler):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Calls(TorchFunctionMode):
    def __init__(self, running: list[str], handler: Handler) -> None:
        super().__init__()
        self.running, self.handler = running, handler
        self.calls: Counter[str] = Counter()
        self.masks: dict[int, tuple[Tensor, bool]] = {}  # kept, so that no other takes its place

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)
        arguments = dict(zip(_ARGUMENTS, args, strict=False)) | named
        name = self.running[-1] if self.running else ""
        index = self.calls[name]
        self.calls[name] += 1
        call = Call(
            numbered(name, index), arguments, self._is_causal(arguments), _heads(arguments)
        )
        return self.handler(call, lambda: func(*args, **named))

    def _is_causal(self, arguments: Mapping[str, Any]) -> bool:
        q, k, v = (arguments[name] for name in _ARGUMENTS[:3])
        if q.dim() != 4 or q.shape[2] != k.shape[2] or not q.shape[0] == k.shape[0] == v.shape[0]:
            return False
        mask = arguments.get("attn_mask")
        if mask is None or arguments.get("dropout_p"):
            return bool(arguments.get("is_causal")) and not arguments.get("dropout_p")
        if id(mask) not in self.masks:
            self.masks[id(mask)] = mask, _says_causal(mask, q.shape[2])
        return self.masks[id(mask)][1]


def numbered(name: str, index: int) -> str:
    """How the call of that index is named, of those that a module makes."""
    return f"{name}#{index}" if index else name


def _says_causal(mask: Tensor, n: int) -> bool:
    """Whether a mask of ``(..., queries, keys)`` hides what is later, and nothing else."""
    if mask.shape[-2:] != (n, n):
        return False
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == causal).all())
    hidden = mask <= torch.finfo(mask.dtype).min
    return bool(((mask == 0) == causal).all()) and bool((hidden == ~causal).all())


def _heads(arguments: Mapping[str, Any]) -> int:
    """Heads of keys that differ: groups that were expanded are told by their numbers."""
    q, k, v = (arguments[name] for name in _ARGUMENTS[:3])
    if q.dim() != 4 or k.shape[1] != v.shape[1]:
        return 0
    heads = int(k.shape[1])
    for group in range(heads, 1, -1):
        if heads % group == 0 and q.shape[1] == heads and _is_repeated((k, v), group):
            return heads // group
    return heads


def _is_repeated(tensors: tuple[Tensor, ...], group: int) -> bool:
    grouped = (torch.unflatten(t.detach(), 1, (-1, group)) for t in tensors)
    return all(bool((t == t[:, :, :1]).all()) for t in grouped)
