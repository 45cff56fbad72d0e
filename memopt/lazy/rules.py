"""What stays lazy: a rule for each function of torch that does not need all logits.

A function that picks or regroups rows is applied to the hidden state; one of each row by itself is
noted; one that shrinks the rows is evaluated at once, by chunks. A rule is called with the rows,
the function and its further arguments. Whatever has none, or is declined, needs all values.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from memopt._torch import pytree
from memopt.lazy.rows import Map, Rows, autocasts

Rule = Callable[..., Any]


def apply_rule(rows: Rows, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` makes of the rows: ``Rows``, tensors, or NotImplemented if it needs them all.

    Args:
        rows: the first argument, pending.
        func: a function or method of torch, as ``__torch_function__`` gets it.
        args: the other positional arguments; other lazy tensors are ``Rows``.
        kwargs: the keyword arguments, likewise.
    """
    rule = RULES.get(func)
    several = any(isinstance(leaf, Rows) for leaf in pytree.tree_leaves((args, kwargs)))
    if rule is None or "out" in kwargs or (several and rule is not scale):
        return NotImplemented
    if rule in (each, scale, normalise) and autocasts(rows.hidden.device):
        return NotImplemented  # the dtype would depend on where it is evaluated
    return rule(rows, func, *args, **kwargs)


def regroup(rows: Rows, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Another shape for the rows: numbers stay in order, so the last dimension says it all."""
    like = func(rows.like, *args, **kwargs)
    if like.shape[-1:] != rows.like.shape[-1:] or like.dtype != rows.like.dtype:
        return NotImplemented
    hidden = rows.hidden.reshape(*like.shape[:-1], rows.hidden.shape[-1])
    if like.untyped_storage()._cdata != rows.like.untyped_storage()._cdata:
        return rows.copy(like, hidden=hidden)  # no strides fit: reshape copies
    return rows.view(like, lambda value: func(value, *args, **kwargs), hidden=hidden)


def pick(rows: Rows, func: Any, *args: Any, position: int, **kwargs: Any) -> Any:
    """Views of some rows: select, narrow, unbind, split, chunk."""
    dim = kwargs["dim"] if "dim" in kwargs else (*args, 0, 0)[position]
    if type(dim) is not int or dim in (-1, rows.like.ndim - 1):
        return NotImplemented

    def nth(i: int, value: torch.Tensor) -> torch.Tensor:
        piece: torch.Tensor = func(value, *args, **kwargs)[i]
        return piece

    hidden, like = func(rows.hidden, *args, **kwargs), func(rows.like, *args, **kwargs)
    if isinstance(hidden, torch.Tensor):
        return rows.view(like, lambda value: func(value, *args, **kwargs), hidden=hidden)
    pieces = enumerate(zip(hidden, like, strict=True))
    return tuple(rows.view(shape, partial(nth, i), hidden=h) for i, (h, shape) in pieces)


def index(rows: Rows, func: Any, key: Any) -> Any:
    """Indexing of the rows; and of the vocabulary, by a slice."""
    items = key if isinstance(key, tuple) else (key,)
    if not all(i is None or i is ... or type(i) in (int, slice, torch.Tensor) for i in items):
        return NotImplemented
    missing = rows.like.ndim - sum(_dims_taken(i) for i in items)
    at = next((n for n, i in enumerate(items) if i is ...), len(items))
    items = (*items[:at], *[slice(None)] * missing, *items[at + 1 :])
    if missing < 0 or not isinstance(columns := items[-1], slice):
        return NotImplemented
    head = rows.head
    if columns != slice(None):
        if not rows.elementwise:
            return NotImplemented
        head = head.columns(columns)
    hidden = rows.hidden[items[:-1]]
    if not any(isinstance(i, torch.Tensor) for i in items):
        view = rows.like[key]
        return rows.view(view, lambda value: value[key], hidden=hidden, head=head)
    shape = (*hidden.shape[:-1], head.weight.shape[0])
    return rows.copy(rows.like.new_empty(shape), hidden=hidden, head=head)


def _dims_taken(item: Any) -> int:
    """How many dimensions an item of an index stands for."""
    if item is None or item is ...:
        return 0
    mask = isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8)
    return int(item.ndim) if mask else 1


def detach(rows: Rows, func: Any) -> Rows:
    """The same values, cut off from the graph, which they do not keep alive."""
    return rows.detached().view(rows.like, func)


def duplicate(rows: Rows, func: Any, *args: Any, **kwargs: Any) -> Rows:
    """A copy, or for ``contiguous`` perhaps none."""
    like = func(rows.like, *args, **kwargs)
    return rows if like is rows.like else rows.copy(like)


def cast(rows: Rows, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Another floating dtype on the same device."""
    probe = rows.probe
    out = func(probe, *args, **kwargs)
    if out is probe:
        return rows
    if not isinstance(out, torch.Tensor):  # type() with no argument
        return out
    if out.device != probe.device or not out.is_floating_point():
        return NotImplemented
    return rows.then(lambda value: value.to(out.dtype), out.dtype)


def each(rows: Rows, func: Any) -> Rows:
    """A function of each number."""
    return rows.then(func)


def scale(rows: Rows, func: Any, other: Any) -> Any:
    """A product or quotient with a number, or with other values of the same logits."""
    if type(other) in (int, float):
        return rows.then(lambda value: func(value, other))
    if not isinstance(other, Rows) or not other.pending or not rows.twin_of(other):
        return NotImplemented
    first, second = rows.function, other.function
    elementwise = rows.elementwise and other.elementwise
    like = func(rows.like, other.like)
    return rows.copy(like, function=lambda z: func(first(z), second(z)), elementwise=elementwise)


def normalise(rows: Rows, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Softmax and its logarithm over the vocabulary."""
    call = _over_vocabulary(rows, func, args, kwargs, position=0)
    if call is None:
        return NotImplemented
    return rows.then(call, call(rows.probe).dtype, elementwise=False)


def reduce(rows: Rows, func: Any, *args: Any, position: int, **kwargs: Any) -> Any:
    """A reduction over the vocabulary."""
    call = _over_vocabulary(rows, func, args, kwargs, position)
    return NotImplemented if call is None else rows.by_chunks(call)


def gather(rows: Rows, func: Any, dim: int, index: torch.Tensor, **kwargs: Any) -> Any:
    """Some entries of every row, such as those of the labels."""
    like = rows.like
    if dim not in (-1, like.ndim - 1) or index.shape[:-1] != like.shape[:-1]:
        return NotImplemented

    def call(value: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        """With as many dimensions as eager has, which it names where an index is out of bounds."""
        ones = (1,) * like.ndim
        lifted, at = (t.reshape((ones + t.shape)[-like.ndim :]) for t in (value, i))
        picked: torch.Tensor = func(lifted, -1, at, **kwargs)
        return picked.reshape(i.shape)

    return rows.by_chunks(call, index)


def _over_vocabulary(
    rows: Rows, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], position: int
) -> Map | None:
    """The call for any number of rows; None if it is over other dimensions too, or instead."""
    name = "axis" if "axis" in kwargs else "dim"
    given = len(args) > position
    default = -1 if func in (torch.topk, torch.Tensor.topk) else None
    dim = args[position] if given else kwargs.get(name, default)
    if isinstance(dim, Sequence) and len(dim) == 1:
        (dim,) = dim
    if type(dim) is not int or dim not in (-1, rows.like.ndim - 1):
        return None
    if given:
        args = (*args[:position], -1, *args[position + 1 :])
    else:
        kwargs = {**kwargs, name: -1}
    return lambda value: func(value, *args, **kwargs)


def spelled(names: str) -> list[Any]:
    """The functions behind some names, as methods, in ``torch`` and in ``torch.nn.functional``."""
    homes = (torch.Tensor, torch, F)
    return [getattr(h, name) for name in names.split() for h in homes if hasattr(h, name)]


RULES: dict[Any, Rule] = {
    function: rule
    for names, rule in (
        ("view reshape flatten unflatten squeeze unsqueeze", regroup),
        ("select narrow unbind", partial(pick, position=0)),
        ("split chunk", partial(pick, position=1)),
        ("__getitem__", index),
        ("detach", detach),
        ("clone contiguous", duplicate),
        ("float double half bfloat16 to type type_as cpu cuda", cast),
        ("exp neg", each),
        ("mul div", scale),
        ("softmax log_softmax", normalise),
        ("argmax max amax min amin sum logsumexp", partial(reduce, position=0)),
        ("topk", partial(reduce, position=1)),
        ("gather", gather),
    )
    for function in spelled(names)
}
