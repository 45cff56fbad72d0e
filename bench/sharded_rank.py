"""One rank of a model under FSDP2: its blocks compiled by a peer, and the measurements on it."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench.meter import Meter
from bench.peers import PEERS
from bench.zoo import MODELS, step


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run.

    Attributes:
        model: a Llama of the zoo.
        size: which of its sizes.
        world: how many ranks.
        rounds: of timing.
        device: ``"cpu"`` or ``"cuda"``.
        options: for memopt, beside its budget.
    """

    model: str = "llama_b"
    size: str = "bench"
    world: int = 2
    rounds: int = 7
    device: str = "cpu"
    options: Mapping[str, object] = field(default_factory=dict)


class Rank:
    """One rank of one peer: a model that is sharded, and the measurements on it.

    Args:
        setting: what is run.
        peer: its name.
        budget: memopt's.
        folder: where the ranks meet, and where the compiler may keep what it made.
        rank: which one this is.
    """

    def __init__(self, setting: Setting, peer: str, budget: Any, folder: Path, rank: int) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"cache{rank}")
        torch.set_num_threads(1)
        on_gpu = setting.device == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=setting.world,
        )
        self.device = f"cuda:{rank}" if on_gpu else "cpu"
        if on_gpu:
            torch.cuda.set_device(rank)
        entry = MODELS[setting.model]
        self.model, _ = entry.make(setting.size, device=self.device)
        inputs = entry.sizes[setting.size].inputs(1 + rank)
        self.inputs = {name: value.to(self.device) for name, value in inputs.items()}
        blocks = [*self.model.get_submodule("model.layers").children()]
        self.head_bytes = _head_bytes(self.model, self.inputs["labels"])
        nbytes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
        rest = sum(p.nbytes for p in self.model.parameters()) - sum(nbytes)
        self.gathered_bytes = rest + sum(sorted(nbytes)[-2:])
        arguments = _arguments(setting, peer, budget, len(blocks))
        mesh = init_device_mesh(setting.device, (setting.world,))
        for block in blocks:
            if arguments is not None:
                block.compile(**arguments)
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, foreach=False)

    def prepare(self, steps: int) -> dict[str, Any]:
        """Losses of some steps of training, and the bytes of one more, without the optimizer's."""
        losses, start = [], time.perf_counter()
        for _ in range(steps):
            losses.append(self._timed()[1])
            if len(losses) == 1:
                first = time.perf_counter() - start
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        with Meter(self.device) as meter:
            step(self.model, self.inputs)
        return {
            "losses": losses,
            "first_step_seconds": first,
            "peak_bytes": meter.peak_bytes,
            "gathered_bytes": self.gathered_bytes,
            "head_bytes": self.head_bytes,
        }

    def time(self, steps: int) -> list[float]:
        """Seconds of each step, which ranks start together."""
        return [self._timed()[0] for _ in range(steps)]

    def _timed(self) -> tuple[float, float]:
        self.model.zero_grad(set_to_none=True)
        dist.barrier()
        start = time.perf_counter()
        loss = step(self.model, self.inputs).item()  # waits for the device
        return time.perf_counter() - start, loss


def _head_bytes(model: Any, labels: Tensor) -> int:
    """What head and loss of a Llama take in eager, forward and backward."""
    shape = (*labels.shape, model.config.hidden_size)
    x = torch.zeros(shape, dtype=model.dtype, device=labels.device, requires_grad=True)
    with Meter(labels.device) as meter:
        logits = model.lm_head(model.model.norm(x))
        model.loss_function(logits, labels, vocab_size=model.config.vocab_size).backward()
    model.zero_grad(set_to_none=True)
    return meter.peak_bytes


def _arguments(setting: Setting, peer: str, budget: Any, blocks: int) -> dict[str, Any] | None:
    """Of ``compile`` for each block; None for eager."""
    compiler = PEERS[peer].compiler
    if compiler == "eager":
        return None
    if compiler == "inductor":
        return {}
    own = {"memory_budget": budget, "repeats": blocks, **setting.options}
    return {"backend": "memopt", "options": own}
