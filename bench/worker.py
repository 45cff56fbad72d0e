"""One peer in a process of its own.

Compilers keep caches and settings per process, so each peer lives alone; the runner asks the
processes in turn, which keeps their times comparable.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn

import memopt
from bench.cases import Case
from bench.libraries import LIBRARIES, Library
from bench.meter import Meter
from bench.offloading import Offloaded, offload_in_inductor
from bench.peers import Peer
from bench.zoo import MODELS, FusedHead, LossOnly, checkpoint_blocks, loss_of, step
from bench.zoo.decoders import LatentDecoder

Gradients = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything a worker needs to know.

    Attributes:
        case: what to run.
        peer: how to run it.
        memory_budget: memopt's budget, resolved.
        device: ``"cpu"`` or ``"cuda"``.
        seed: seed of weights, inputs and dropout.
        cache_dir: an empty folder for the compiler's caches, or None to use the user's own.
        reference: file of the gradients to compare with; written by the peer that ``writes``.
        writes: whether this peer's gradients are the reference.
    """

    case: Case
    peer: Peer
    memory_budget: int | float | str | None
    device: str
    seed: int
    cache_dir: Path | None
    reference: Path
    writes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the first steps of a peer showed; bytes are above what was resident before the step.

    There are no ``step_seconds`` where kernels are interpreted.
    """

    peak_bytes: int
    end_bytes: int
    reserved_bytes: int | None
    gradient_bytes: int
    predicted_peak_bytes: int | None
    first_step_seconds: float
    step_seconds: float | None
    loss: float
    gradient_error: float | None


def compile_for(
    peer: Peer, module: nn.Module, budget: int | float | str | None, device: str
) -> Any:
    """The module as this peer runs it."""
    inner = module.model if isinstance(module, LossOnly) else module
    if peer.checkpoint:
        checkpoint_blocks(inner, selective=peer.selective)
    if peer.tile is not None:
        if not isinstance(inner, LatentDecoder):
            raise ValueError(f"{type(inner).__name__} decodes no latents")
        inner.tile = peer.tile
    if peer.activation_budget is not None:
        torch._functorch.config.activation_memory_budget = peer.activation_budget
    if peer.compiler == "eager":
        return Offloaded(module) if peer.offload else module
    if peer.compiler == "inductor":
        if peer.offload:
            offload_in_inductor()
        torch._inductor.config.auto_chunker.enable = peer.auto_chunker
        torch._inductor.config.efficient_conv_bn_eval_fx_passes = peer.folded_norms
        if peer.library is None:
            return torch.compile(module)
        return _with_library(LIBRARIES[peer.library], module, device)
    return torch.compile(module, backend="memopt", options=memopt_options(peer, budget))


def memopt_options(peer: Peer, budget: int | float | str | None) -> dict[str, Any]:
    """As ``torch.compile`` and ``memopt.explain`` take them."""
    return {"memory_budget": budget, "passes": {"offload": True} if peer.offload else {}}


def _with_library(library: Library, module: Any, device: str) -> nn.Module:
    """The module with the library's head; compiled whole, or but for that head."""
    fused = FusedHead(module, library.loss(device))
    (fused if library.traced else module.model).compile()
    return fused


def relative_error(actual: Gradients, expected: Gradients) -> float:
    """Largest error of a gradient's entry, relative to the largest entry of that gradient.

    Gradients that are zero but for rounding (attention's key bias is one) would compare noise
    with noise, so a gradient's scale counts as at least a thousandth of the largest one's.
    """
    scales = {name: grad.abs().max().item() for name, grad in expected.items()}
    least = max(max(scales.values()) / 1000, 1e-30)
    return max(
        (actual[name] - grad).abs().max().item() / max(scales[name], least)
        for name, grad in expected.items()
    )


class Session:
    """The worker's side: a model, compiled, and the measurements on it."""

    def __init__(self, job: Job) -> None:
        if job.cache_dir is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.cache_dir)
        self.job = job
        case = job.case
        self.module, self.inputs = MODELS[case.model].make(
            case.size, dtype=getattr(torch, case.dtype), device=job.device, seed=job.seed
        )
        if case.outputs == "loss":
            self.module = LossOnly(self.module)
        self.model = compile_for(job.peer, self.module, job.memory_budget, job.device)

    def _step(self) -> Tensor:
        torch.manual_seed(self.job.seed)
        if not self.job.case.trains:
            with torch.no_grad():
                return loss_of(self.model(**self.inputs))
        return step(self.model, self.inputs, hold_outputs=self.job.case.outputs != "dropped")

    def _timed_step(self) -> tuple[float, float]:
        """Wall-clock and process seconds of one step, gradients cleared before the clock."""
        self.module.zero_grad(set_to_none=True)
        self._synchronise()
        wall, cpu = time.perf_counter(), time.process_time()
        self._step()
        self._synchronise()
        return time.perf_counter() - wall, time.process_time() - cpu

    def _synchronise(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()

    def prepare(self) -> Prepared:
        """Compile, check the numbers, measure the bytes of one whole training step."""
        start = time.perf_counter()
        loss = self._step()
        self._synchronise()
        first_step_seconds = time.perf_counter() - start
        if self.job.peer.compiler != "eager":
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()
        gradient_error = self._compare_gradients()
        timed = self.job.peer.is_timed_on(self.job.device)
        step_seconds = self._timed_step()[0] if timed else None
        self.module.zero_grad(set_to_none=True)
        with Meter(self.job.device) as meter:
            self._step()
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        gradient_bytes = sum(grad.untyped_storage().nbytes() for grad in grads)
        return Prepared(
            peak_bytes=meter.peak_bytes,
            end_bytes=meter.end_bytes,
            reserved_bytes=meter.reserved_bytes,
            gradient_bytes=gradient_bytes,
            predicted_peak_bytes=self._predicted_peak_bytes(),
            first_step_seconds=first_step_seconds,
            step_seconds=step_seconds,
            loss=loss.item(),
            gradient_error=gradient_error,
        )

    def _compare_gradients(self) -> float | None:
        """The error against the reference's gradients, or None before there are any.

        Where nothing is trained: of what the model returns.
        """
        if self.job.case.trains:
            parameters = self.module.named_parameters()
            actual = {name: p.grad for name, p in parameters if p.grad is not None}
        else:
            with torch.no_grad():
                values = self.model(**self.inputs)
            actual = {str(i): value for i, value in enumerate(values)}
        if self.job.writes:
            torch.save(actual, self.job.reference)
        if not self.job.reference.exists():
            return None
        expected: Gradients = torch.load(self.job.reference, map_location=self.job.device)
        return relative_error(actual, expected)

    def _predicted_peak_bytes(self) -> int | None:
        """What memopt says of its own peak, to compare with the allocator's word."""
        if self.job.peer.compiler != "memopt":
            return None
        inputs: dict[str, Any] = dict(self.inputs)
        options = memopt_options(self.job.peer, self.job.memory_budget)
        with torch.set_grad_enabled(self.job.case.trains):
            report = memopt.explain(self.module, **inputs, options=options)
        return report.predicted_peak_bytes

    def time(self, steps: int) -> list[tuple[float, float]]:
        """Wall-clock and process seconds of each of ``steps`` steps, after one to warm up."""
        self._timed_step()
        gc.collect()
        gc.disable()  # what was compiled before must not decide when a collection falls due
        try:
            return [self._timed_step() for _ in range(steps)]
        finally:
            gc.enable()


def serve(connection: Connection, make: Callable[[], object]) -> None:
    """Answer the runner's calls until it hangs up; a failure is an answer too.

    Args:
        connection: where calls come from.
        make: makes the session whose methods are called, at the first call.
    """
    session = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            session = session or make()
            connection.send((True, getattr(session, method)(*arguments)))
        except Exception as error:  # every failure of a peer belongs in the results
            cause = getattr(error, "inner_exception", None) or error
            connection.send((False, f"{type(cause).__name__}: {cause}"))
