"""``memopt.optimize``: the one-line form of ``torch.compile(..., backend="memopt")``."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import nn

from memopt._torch import dynamo_config
from memopt.errors import ConfigError, shown

T = TypeVar("T")


@overload
def optimize(target: T, **options: Any) -> T: ...


@overload
def optimize(target: None = None, **options: Any) -> Callable[[T], T]: ...


def optimize(target: Any = None, **options: Any) -> Any:
    """Compile a function, a module or a module class under a memory budget.

    ``model = memopt.optimize(model, memory_budget=0.5)`` or, as a decorator,
    ``@memopt.optimize(memory_budget=0.5)``. A module class keeps its name and its type; every
    instance made from it compiles its ``forward``. A module instance is compiled in place, so
    its type, ``state_dict`` and hooks stay as they are.

    Messages that a model library logs once, such as ``logger.warning_once`` of transformers, are
    left out of what is compiled: each would break the graph, often between head and loss. Rows
    that a mask picks, ``values[mask]``, are compiled, where ``torch.compile`` breaks the graph.

    Args:
        target: what to compile; None when used as a decorator with options.
        **options: the entries of ``torch.compile(options=...)``, see ``memopt.Config``, and the
            arguments ``dynamic`` and ``fullgraph`` of ``torch.compile`` itself.

    Raises:
        ConfigError: an option is unknown or impossible; raised here, before anything is compiled.
    """
    if target is None:
        return lambda later: optimize(later, **options)
    arguments: dict[str, Any] = {
        name: options.pop(name) for name in ("dynamic", "fullgraph") if name in options
    }
    for name, value in arguments.items():
        allowed = (True, False, None) if name == "dynamic" else (True, False)
        if not any(value is one for one in allowed):
            words = " or ".join(map(str, allowed))
            raise ConfigError(f"option {name!r} = {shown(value)}: allowed is {words}")
    _validate(options)
    _ignore_messages()
    arguments.update(backend="memopt", options=options)
    if isinstance(target, type):
        return _optimize_class(target, arguments)
    if isinstance(target, nn.Module):
        _compile_module(target, arguments)
        return target
    if callable(target):
        return _picking_rows(torch.compile(target, **arguments))
    raise TypeError(
        f"memopt.optimize takes a function, an nn.Module or an nn.Module class, not {target!r}"
    )


def _compile_module(module: nn.Module, arguments: dict[str, Any]) -> None:
    module.compile(**arguments)
    if module._compiled_call_impl is not None:
        module._compiled_call_impl = _picking_rows(module._compiled_call_impl)


def _picking_rows(run: Callable[..., Any]) -> Callable[..., Any]:
    """Have Dynamo take ``x[mask]``, of as many rows as the mask picks, into its graphs.

    The setting holds while ``run`` is called, as Dynamo's own for ``dynamic=True`` does.
    """

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
            return run(*args, **kwargs)

    return call


def _optimize_class(cls: type, arguments: dict[str, Any]) -> type:
    """Make every instance compile its forward; the class itself stays the same object."""
    if not issubclass(cls, nn.Module):
        raise TypeError(f"memopt.optimize takes nn.Module classes, and {cls.__name__} is none")
    plain_init = cls.__init__

    def compiled_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        _compile_module(self, arguments)

    functools.update_wrapper(compiled_init, plain_init)
    setattr(cls, "__init__", compiled_init)  # noqa: B010 (mypy forbids the plain assignment)
    return cls


def _validate(options: dict[str, Any]) -> None:
    from memopt.backend import read_options

    read_options(options)


def _ignore_messages() -> None:
    """Have Dynamo skip what transformers adds to ``logging.Logger``, where it is imported."""
    for name in ("warning_once", "info_once", "warning_advice"):
        method = getattr(logging.Logger, name, None)
        if method is not None:
            dynamo_config.ignore_logging_functions.add(method)
