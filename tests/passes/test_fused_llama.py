"""A Llama training step whose norms, gates and rotary embeddings are operators of memopt's."""

from typing import Any

import memopt
from bench.zoo import hugging_face
from memopt.record import GraphRecord

FUSING = ("fuse_norms", "fuse_gates", "fuse_rotary")


def planned(passes: dict[str, Any]) -> GraphRecord:
    """The plan without a budget, of the proportions of a Llama of 8 billion parameters."""
    recipe = hugging_face.llama(2, 512, 128, 448, 8, 2, batch=1, length=256)
    model, inputs = recipe.build(), dict[str, Any](recipe.inputs(0))
    options: dict[str, Any] = {"passes": {"chunk_losses": False, **passes}}
    (graph,) = memopt.explain(model, options=options, **inputs).graphs
    return graph


def test_it_holds_three_quarters_of_what_inductor_holds_and_recomputes_no_more() -> None:
    stock = planned(dict.fromkeys((*FUSING, "remake_in_backward"), False))
    fused = planned({name: {"cpu": True} for name in FUSING})
    assert fused.saved_bytes <= 0.75 * stock.saved_bytes
    assert fused.recompute_seconds <= stock.recompute_seconds
    assert fused.rewrites["fuse_norms"] == 5
    assert fused.rewrites["fuse_gates"] == 2
    assert fused.rewrites["remake_in_backward"] == 7
