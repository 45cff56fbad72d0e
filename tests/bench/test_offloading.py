"""Peers that hold values on the host: who they are, and what they mark."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bench.offloading import mark_large_values
from bench.peers import OFFLOADS, PEERS


def test_they_run_where_there_is_another_memory() -> None:
    for peer in (PEERS[name] for name in OFFLOADS):
        assert peer.unavailable("cuda") is None
        assert bool(peer.unavailable("cpu")) == peer.offload


def test_large_values_are_marked() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).sum(0)

    graph = make_fx(function, tracing_mode="fake")(torch.zeros(512, 512)).graph
    mark_large_values(graph)
    marked = [node.meta.get("should_offload") for node in graph.nodes]
    assert marked == [None, True, False, None]
