"""FSDP2 by formula: bytes of a rank, and seconds of a step, from the planner's of its parts.

A reader can check them by hand. Every rank has the same batch, so all are alike.

Sources: sharded parameters, gathered block by block, are those of ZeRO's third stage (Rajbhandari
et al., 2020, arXiv:1910.02054) and of FSDP (Zhao et al., 2023, arXiv:2304.11277); the time of a
ring is that of Patarasuk and Yuan (2009).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """What joins the ranks: nodes of GPUs, all to all within, one network card to each GPU.

    Attributes:
        node: GPUs of a node.
        inner: bytes per second that a GPU sends within its node.
        outer: bytes per second of a GPU's network card.
        inner_hop_seconds, outer_hop_seconds: of a message's start, within and between nodes.
    """

    node: int = 8
    inner: float = 450e9
    outer: float = 50e9
    inner_hop_seconds: float = 1e-6
    outer_hop_seconds: float = 5e-6

    def ring_seconds(self, nbytes: float, ranks: int) -> float:
        """Time of an all-gather to, or a reduce-scatter of, ``nbytes`` over a ring.

        Each rank passes on all but its own share, one share a hop. Between nodes every card
        carries a part of the ring's traffic, so a node has the bandwidth of all its cards.
        """
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.node)
        bandwidth = self.inner if nodes == 1 else min(self.inner, self.node * self.outer)
        outer_hops = nodes if nodes > 1 else 0
        hops = (ranks - 1 - outer_hops) * self.inner_hop_seconds
        hops += outer_hops * self.outer_hop_seconds
        return nbytes * (ranks - 1) / ranks / bandwidth + hops


@dataclass(frozen=True, kw_only=True)
class Part:
    """Head and loss, or a block under one plan, on one rank.

    Attributes:
        parameters: how many.
        peak_bytes: the planner's, gradients of it and, of blocks, what all others hold included.
        held_bytes: what it leaves for its backward and for what follows, all of a kind together.
        forward_seconds, backward_seconds: the planner's, recomputation included.
    """

    parameters: int
    peak_bytes: int
    held_bytes: int
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and in which types.

    Attributes:
        blocks: how many.
        embedding: parameters that are in no block and not in the head.
        width_bytes: of a gathered parameter.
        reduced_bytes: of a gradient when it is reduced.
        state_bytes: of a parameter, its gradient and the optimizer's state, where they are
            sharded: float32 each, and two moments of AdamW.
    """

    blocks: int
    embedding: int
    width_bytes: int = 2
    reduced_bytes: int = 4
    state_bytes: int = 16

    def sharded_bytes(self, block: Part, head: Part, ranks: int) -> float:
        """What a rank holds for good."""
        parameters = self.blocks * block.parameters + head.parameters + self.embedding
        return self.state_bytes * parameters / ranks

    def gathered_bytes(self, block: Part, head: Part) -> int:
        """Whole parameters: of two blocks, the next on its way; and of what is in no block."""
        return self.width_bytes * (2 * block.parameters + head.parameters + self.embedding)

    def reduced_block_bytes(self, block: Part) -> int:
        """A block's gradients on their way, while those of the next one are made."""
        return self.reduced_bytes * block.parameters

    def around_bytes(self, block: Part, head: Part, ranks: int) -> float:
        """All of a rank's bytes that are no graph's."""
        return (
            self.sharded_bytes(block, head, ranks)
            + self.gathered_bytes(block, head)
            + self.reduced_block_bytes(block)
        )

    def rank_bytes(self, block: Part, head: Part, ranks: int) -> float:
        """Peak of a rank: in a block's backward, or in the head with what all blocks hold."""
        graphs = max(block.peak_bytes, head.peak_bytes + block.held_bytes)
        return self.around_bytes(block, head, ranks) + graphs

    def step_seconds(self, block: Part, head: Part, ranks: int, fabric: Fabric) -> float:
        """Forward and backward of all blocks, each beside the collectives of its neighbours.

        Not beside anything: the first gathers, of what is in no block and of the first block, and
        the last reduction. In the backward a block's parameters are gathered and another's
        gradients reduced, one after the other on the same links.
        """
        rest = head.parameters + self.embedding
        gather = fabric.ring_seconds(self.width_bytes * block.parameters, ranks)
        reduce = fabric.ring_seconds(self.reduced_bytes * block.parameters, ranks)
        first = fabric.ring_seconds(self.width_bytes * rest, ranks) + gather
        last = reduce + fabric.ring_seconds(self.reduced_bytes * rest, ranks)
        forward = self.blocks * max(block.forward_seconds, gather)
        backward = self.blocks * max(block.backward_seconds, gather + reduce)
        return first + forward + head.forward_seconds + head.backward_seconds + backward + last
