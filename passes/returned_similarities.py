"""What the graph returns in the place of similarities that a contrastive loss no longer makes.

Lazy similarities are computed when they are used, from the embeddings of both sides. Both are
activations: they become results of the graph, one times the scale, and what wraps the graph takes
them away again.
"""

import operator

import torch
from torch import fx

from memopt.emit import emit, traced
from memopt.passes.similarities import Pair, Product, Scale, product_of
from memopt.passes.steps import is_symbolic
from memopt.pipeline import PassContext
from memopt.returned import ReturnedSimilarities, Similarities


def refusal(pair: Pair, mode: str, returned: set[fx.Node]) -> str:
    """Why similarities that are returned cannot be given up; or ``""``."""
    if mode == "full":
        return "the graph returns the similarities, and logits='full' keeps them whole"
    known = [product_of(node) for node in returned]
    sides = {pair.a.product.x, pair.a.product.y}
    if mode == "lazy" and any(p is not None and p.shifts for p in known):
        return "the graph returns similarities with something added"
    if mode == "lazy" and any(p is None or {p.x, p.y} != sides for p in known):
        return "the graph returns similarities whose embeddings are not found"
    return ""


def replace_returned(output: fx.Node, pair: Pair, mode: str, ctx: PassContext) -> None:
    """Put something else into the places where the output has similarities.

    Args:
        output: the output.
        pair: the losses that read them.
        mode: see ``ChunkLosses.logits``.
        ctx: takes what is to be done to the results.
    """
    graph, results = output.graph, list(output.args[0])  # type: ignore[arg-type]
    places = [i for i, node in enumerate(results) if node in pair.similarities]
    if mode == "none":
        results = [None if i in places else node for i, node in enumerate(results)]
    elif mode == "keep":
        with graph.inserting_before(output):
            for i in places:
                results[i] = emit(graph, "detach", (results[i],), like=results[i])
    elif places:
        results, made = _lazy(graph, results, places)
        # The last results are taken away first.
        ctx.wrappers.insert(0, made.wrap)
    output.args = (tuple(results),)


def _lazy(
    graph: fx.Graph, results: list[fx.Node], places: list[int]
) -> tuple[list[fx.Node], ReturnedSimilarities]:
    """Results with embeddings in place of similarities, and what makes these of them."""
    extra, matrices = list[fx.Node](), list[Similarities]()
    changed = list(results)
    for i in places:
        node, product = results[i], product_of(results[i])
        assert product is not None
        changed[i] = _scaled(graph, product, node)
        if product.y not in extra:
            extra.append(product.y)
        matrices.append(
            Similarities(
                hidden=i,
                weight=len(results) + extra.index(product.y),
                product_dtype=traced(product.similarities[-1]).dtype,
                dtype=traced(node).dtype,
                detached=not traced(node).requires_grad,
            )
        )
    return [*changed, *extra], ReturnedSimilarities(tuple(matrices), len(extra))


def _scaled(graph: fx.Graph, product: Product, like: fx.Node) -> fx.Node:
    """The first embeddings of a product times its scale, in their own dtype."""
    x, scale = product.x, product.scale
    if scale.tensor is None and scale.number == 1:
        return x
    dtype = traced(x).dtype
    factor = scale_tensor(graph, scale, x, dtype, like)
    scaled = emit(graph, operator.mul, (x, factor), like=like)
    if traced(scaled).dtype == dtype:
        return scaled
    return emit(graph, "to", (scaled, dtype), like=like)


def scale_tensor(
    graph: fx.Graph, scale: Scale, x: fx.Node, dtype: torch.dtype, like: fx.Node
) -> fx.Node:
    """The whole scale as a tensor without dimensions.

    Args:
        graph: the graph, positioned.
        scale: the scale.
        x: a tensor on the device where it is to be.
        dtype: of the similarities; a number becomes float32 or wider.
        like: the node whose source line the new ones inherit.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if scale.tensor is None:
        return emit(graph, "new_full", (x, (), scale.number), {"dtype": wide}, like=like)
    if is_symbolic(scale.tensor):  # filling with it would fix its value
        one = emit(graph, "new_ones", (x, ()), {"dtype": wide}, like=like)
        whole = emit(graph, operator.mul, (one, scale.tensor), like=like)
    else:
        whole = emit(graph, "reshape", (scale.tensor, ()), like=like)
    if scale.divides:
        return emit(graph, operator.truediv, (scale.number, whole), like=like)
    if scale.number == 1:
        return whole
    return emit(graph, operator.mul, (whole, scale.number), like=like)
