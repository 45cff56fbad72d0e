"""Who is compared: eager, stock Inductor and its settings, hand-placed checkpoints, memopt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.libraries import LIBRARIES


@dataclass(frozen=True, slots=True)
class PeakOf:
    """A budget in bytes: a share of the peak that another peer reached in the same run."""

    peer: str
    share: float = 1.0


Budget = int | float | str | None | PeakOf
_OFFLOADS = {
    "eager": "saved values on the host by `torch.autograd.graph.save_on_cpu`",
    "inductor": "`torch._functorch.config.enable_activation_offloading`, values from 1 MiB marked",
    "memopt": "the pass `offload` on",
}
_COMPILERS = {"eager": "no compilation", "inductor": "`torch.compile`", "memopt": "memopt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to run a training step.

    Attributes:
        name: how results refer to it.
        compiler: what runs the step.
        checkpoint: whether every block runs under `torch.utils.checkpoint`.
        selective: whether these hold some results, as torchtitan's do.
        offload: whether saved values may lie on the host, by each compiler's own means.
        activation_budget: functorch's ``activation_memory_budget``, a share of saved bytes.
        memory_budget: memopt's option of that name; a `PeakOf` is turned into bytes.
        auto_chunker: whether Inductor's own chunking of losses is on.
        folded_norms: whether Inductor's own rewrite of convolutions with norms in eval mode is.
        tile: side of the squares of latents that a decoder of images decodes one at a time.
        library: whose linear layer and cross-entropy in one are the head and loss, if any.
    """

    name: str
    compiler: Literal["eager", "inductor", "memopt"]
    checkpoint: bool = False
    selective: bool = False
    offload: bool = False
    activation_budget: float | None = None
    memory_budget: Budget = None
    auto_chunker: bool = False
    folded_norms: bool = False
    tile: int | None = None
    library: str | None = None

    @property
    def description(self) -> str:
        """What it is, in one line of Markdown."""
        words = [_COMPILERS[self.compiler]]
        if self.compiler == "memopt":
            words.append(_budget_in_words(self.memory_budget))
        if self.checkpoint:
            words.append("every block under `torch.utils.checkpoint`")
        if self.selective:
            words.append("which holds attention and every second product, as torchtitan's does")
        if self.offload:
            words.append(_OFFLOADS[self.compiler])
        if self.activation_budget is not None:
            share = f"{self.activation_budget:g}"
            setting = f"torch._functorch.config.activation_memory_budget = {share}"
            words.append(f"`{setting}`, a bound on saved bytes")
        if self.auto_chunker:
            words.append("Inductor's own chunking of losses on")
        if self.folded_norms:
            words.append("`torch._inductor.config.efficient_conv_bn_eval_fx_passes`")
        if self.tile is not None:
            words.append(
                f"squares of {self.tile} latents, as `enable_tiling` of diffusers has them"
            )
        if self.library is not None:
            words.append(f"head and loss in one from {LIBRARIES[self.library].distribution}")
        return ", ".join(words)

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on this kind of device here, or None if it can."""
        if self.offload and device == "cpu":
            return "the CPU has no other memory to hold values in"
        return None if self.library is None else LIBRARIES[self.library].unavailable(device)

    def is_timed_on(self, device: str) -> bool:
        """Whether its times mean anything there."""
        return self.library is None or device not in LIBRARIES[self.library].interpreted_on


def _budget_in_words(budget: Budget) -> str:
    if budget is None:
        return "no budget"
    if isinstance(budget, PeakOf):
        share = "" if budget.share == 1 else f"{budget.share:g} of "
        return f"a budget of {share}the peak of `{budget.peer}` in the same run"
    if budget == "min":
        return 'the lowest peak that it finds (`memory_budget="min"`)'
    return f"`memory_budget={budget!r}`"


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(name="eager", compiler="eager"),
        Peer(name="eager+checkpoint", compiler="eager", checkpoint=True),
        Peer(name="eager+tiles", compiler="eager", tile=16),
        Peer(name="inductor", compiler="inductor"),
        Peer(name="inductor+checkpoint", compiler="inductor", checkpoint=True),
        Peer(
            name="inductor+selective checkpoint",
            compiler="inductor",
            checkpoint=True,
            selective=True,
        ),
        Peer(name="inductor 0.5", compiler="inductor", activation_budget=0.5),
        Peer(name="inductor 0.3", compiler="inductor", activation_budget=0.3),
        Peer(name="inductor 0.1", compiler="inductor", activation_budget=0.1),
        Peer(name="inductor 0", compiler="inductor", activation_budget=0.0),
        Peer(name="inductor auto-chunker", compiler="inductor", auto_chunker=True),
        Peer(name="inductor folded norms", compiler="inductor", folded_norms=True),
        Peer(name="inductor linear_cross_entropy", compiler="inductor", library="torch"),
        Peer(name="inductor+liger", compiler="inductor", library="liger"),
        Peer(name="inductor+cut_cross_entropy", compiler="inductor", library="cut"),
        Peer(name="memopt", compiler="memopt"),
        Peer(name="memopt 0.5", compiler="memopt", memory_budget=0.5),
        Peer(name="memopt min", compiler="memopt", memory_budget="min"),
        Peer(name="eager+offload", compiler="eager", offload=True),
        Peer(name="eager+checkpoint+offload", compiler="eager", checkpoint=True, offload=True),
        Peer(name="inductor+offload", compiler="inductor", offload=True),
        Peer(name="memopt+offload min", compiler="memopt", offload=True, memory_budget="min"),
        Peer(
            name="memopt+offload @ half of inductor",
            compiler="memopt",
            offload=True,
            memory_budget=PeakOf("inductor", 0.5),
        ),
        Peer(
            name="memopt @ half of inductor",
            compiler="memopt",
            memory_budget=PeakOf("inductor", 0.5),
        ),
        Peer(
            name="memopt @ inductor folded norms",
            compiler="memopt",
            memory_budget=PeakOf("inductor folded norms"),
        ),
        Peer(
            name="memopt @ inductor+checkpoint",
            compiler="memopt",
            memory_budget=PeakOf("inductor+checkpoint"),
        ),
        Peer(
            name="memopt @ inductor+selective checkpoint",
            compiler="memopt",
            memory_budget=PeakOf("inductor+selective checkpoint"),
        ),
        Peer(
            name="memopt @ inductor 0.5",
            compiler="memopt",
            memory_budget=PeakOf("inductor 0.5"),
        ),
    )
}

HEADS = (
    "eager", "inductor", "inductor auto-chunker", "inductor linear_cross_entropy",
    "inductor+liger", "inductor+cut_cross_entropy", "memopt", "memopt min",
)  # fmt: skip
CHECKPOINTS = (
    "inductor", "inductor+checkpoint", "inductor+selective checkpoint", "inductor 0.5",
    "memopt @ inductor+checkpoint", "memopt @ inductor+selective checkpoint",
    "memopt @ inductor 0.5",
)  # fmt: skip
OFFLOADS = (
    "eager", "eager+checkpoint", "eager+offload", "eager+checkpoint+offload", "inductor",
    "inductor+offload", "memopt", "memopt @ half of inductor",
    "memopt+offload @ half of inductor", "memopt+offload min",
)  # fmt: skip
NORMS = (
    "eager", "inductor", "inductor+checkpoint", "inductor folded norms", "memopt",
    "memopt @ inductor folded norms", "memopt @ half of inductor", "memopt min",
)  # fmt: skip
ALL = tuple(
    name
    for name, peer in PEERS.items()
    if not (peer.auto_chunker or peer.library or peer.offload or peer.tile)
    and "folded norms" not in name
    and "selective" not in name
)
CORE = (
    "eager", "inductor", "inductor+checkpoint",
    "memopt", "memopt min", "memopt @ half of inductor",
)  # fmt: skip
QUICK = ("eager", "inductor", "memopt", "memopt min")


def with_references(names: Sequence[str]) -> tuple[Peer, ...]:
    """The peers of these names and those whose peaks they need, in the order of the table.

    Raises:
        ValueError: a name is not in the table.
    """
    wanted = set(names)
    for name in names:
        if name not in PEERS:
            raise ValueError(f"no peer {name!r}; there are: {', '.join(PEERS)}")
        budget = PEERS[name].memory_budget
        if isinstance(budget, PeakOf):
            wanted.add(budget.peer)
    return tuple(peer for peer in PEERS.values() if peer.name in wanted)


def resolve_budget(peer: Peer, peak_bytes: Mapping[str, int]) -> int | float | str | None:
    """The budget as memopt takes it.

    Args:
        peer: the peer about to run.
        peak_bytes: the peaks measured so far in this case, by peer.

    Raises:
        LookupError: the budget is relative to a peer that has no peak here.
    """
    budget = peer.memory_budget
    if not isinstance(budget, PeakOf):
        return budget
    if budget.peer not in peak_bytes:
        raise LookupError(f"{budget.peer} has no peak in this case")
    return int(peak_bytes[budget.peer] * budget.share)
