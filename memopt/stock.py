"""What torch's own partitioner does with a joint graph: before it cuts, and what it would save."""

from torch import fx

from memopt._torch import (
    NodeInfo,
    choose_saved_values_set,
    cleanup_recompute_tags,
    force_save_bw_mutation_src,
    force_save_collectives,
    force_save_effectful_ops,
    fx_graph_cse,
    has_recomputable_ops,
)


def tidied(gm: fx.GraphModule) -> fx.GraphModule:
    """A joint graph without dead code or common subexpressions, and with what must be saved."""
    gm.graph.eliminate_dead_code()
    gm.graph = fx_graph_cse(gm.graph)
    if has_recomputable_ops(gm):
        gm = cleanup_recompute_tags(gm, is_default_partition=False)
    force_save_collectives(gm)
    force_save_effectful_ops(gm)
    force_save_bw_mutation_src(gm)
    gm.recompile()
    return gm


def stock_saved_set(gm: fx.GraphModule, info: NodeInfo, share: float = 1) -> set[str]:
    """The saved set of torch's min-cut partitioner: what Inductor would do.

    Args:
        gm: the joint graph.
        info: torch's classification of its nodes.
        share: torch's ``activation_memory_budget``; 1 is its default, with no budget.
    """
    if not info.required_bw_nodes:
        return set()
    far = int(1e9)
    for node in reversed(gm.graph.nodes):
        if node.op != "output" and not info.is_required_fw(node):
            node.dist_from_bw = 0
        else:
            users = [] if node.op == "output" else [u.dist_from_bw + 1 for u in node.users]
            node.dist_from_bw = min([far, *users])
    return {n.name for n in choose_saved_values_set(gm.graph, info, memory_budget=share)}
