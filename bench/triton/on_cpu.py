"""Modules that Inductor generates for CUDA, run on CPU tensors.

A training step goes through `torch.compile` and autograd on fake tensors of a device that
`bench.triton.fake_cuda` makes up. Behind each of them is a real tensor on the CPU. Where
Inductor's module would be called with the fake ones it is called with those, its own kernels and
ours interpreted; what it returns stands behind new fake tensors. Products are torch's on the CPU,
and where an operator's own code asks which device it is on, it goes the CPU's way.

It rests on internals of torch 2.13.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.triton_heuristics import GridExpr
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes as disable_modes

from bench.triton.gate import uninitialised_is_nan
from bench.triton.trace import Launch, trace
from memopt.kernels import serving

Place = tuple[int, int, tuple[int, ...], tuple[int, ...]]
Call = Callable[[list[Any]], Any]


class Twins:
    """Fake CUDA tensors and the real tensors on the CPU behind them.

    Autograd hands out a tensor that it saved as another object, so it is known by its storage.

    Attributes:
        mode: of the fake tensors.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self._real: dict[Place, Tensor] = {}
        self._fakes: list[Tensor] = []  # kept, so that no later storage has an earlier one's name

    def fake(self, real: Tensor) -> Tensor:
        """A new fake tensor in front of a real one."""
        with self.mode:
            twin = torch.empty_strided(
                real.shape, real.stride(), dtype=real.dtype, device=torch.device("cuda", 0)
            )
        self._fakes.append(twin)
        self._real[_place(twin)] = real
        return twin

    def real(self, fake: Tensor) -> Tensor:
        """The real tensor behind a fake one.

        Raises:
            KeyError: there is none: it is a view, or came about outside of a module.
        """
        return self._real[_place(fake)]


def _place(t: Tensor) -> Place:
    return t.untyped_storage()._cdata, int(t.storage_offset()), tuple(t.shape), t.stride()


@contextlib.contextmanager
def modules_on_cpu(twins: Twins) -> Iterator[list[Launch]]:
    """Within it, what Inductor compiles for CUDA runs on the CPU; gives the launches that it made.

    Args:
        twins: know what is behind a module's arguments, and learn what is behind its results.
    """
    launches: list[Launch] = []
    load = GraphLowering._compile_to_module

    def load_on_cpu(lowering: GraphLowering) -> Any:
        module: Any = load(lowering)
        module.call = _behind(module.call, twins, launches)
        return module

    with (
        patch.object(GraphLowering, "_compile_to_module", load_on_cpu),
        patch.object(AsyncCompile, "triton", _interpreted),
        patch.object(guards, "_empty_strided_cuda", _empty_strided),
    ):
        yield launches


def _behind(call: Call, twins: Twins, launches: list[Launch]) -> Call:
    """A module's entry for fake tensors."""

    def run(arguments: list[Any]) -> Any:
        real = [twins.real(a) if isinstance(a, Tensor) else a for a in arguments]
        arguments.clear()
        # A backward runs in a thread of its own, to which what was traced outside is unknown.
        with (
            disable_modes(),
            torch.no_grad(),
            patch.object(serving, "knows", lambda device: True),
            uninitialised_is_nan(),
            trace() as seen,
        ):
            results = call(real)
        launches.extend(seen)
        return [twins.fake(r) if isinstance(r, Tensor) else r for r in results]

    return run


def _empty_strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In the place of the function that makes a module's buffers; torch may fill this one's."""
    return torch.empty_strided(size, stride, dtype=dtype)


def _interpreted(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
    """In the place of ``AsyncCompile.triton``, which would compile for the device."""
    return _Interpreted(getattr(PyCodeCache.load(source_code), kernel_name))


class _Interpreted:
    """A kernel of Inductor's whose launches are interpreted, in its first configuration."""

    def __init__(self, tuner: Any) -> None:
        self._kernel, self._meta, (self._config, *_) = tuner.fn, tuner.inductor_meta, tuner.configs

    def run(self, *arguments: Any, stream: int) -> None:
        """As the generated module calls it."""
        blocks = self._config.kwargs
        names = (name for name in self._kernel.arg_names if name not in blocks)
        given = dict(zip(names, arguments, strict=True))
        grid = GridExpr.from_meta(self._meta, self._config).eval_slow({**given, **blocks})
        self._kernel[grid](**given, **blocks)
