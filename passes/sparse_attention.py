"""Let every head of keys look back as far as a plan of spans says, and no further.

(1) A call is rewritten where it is causal self-attention: told so, as after ``prove_causal``, by
    a mask of positions whose lengths are symbols, or of one query over keys that end in its own,
    as with a cache that grows. The mask may hide padding besides.
(2) The plan knows a call by the module that makes it. A call that it does not know, or with
    other heads, is of another model, which is an error. Attention that is written out is no call.
(3) Lengths that the plan was not made for run in full, with a warning. So does a module of which
    only some calls are in the graph, as behind a graph break: it is not known which they are.
(4) Where a span leaves so little out that nothing is saved, the call stays as it is.

Pays: products, and in decoding the reading of keys and values, as by the plan's density. Does not:
at lengths below the spans. Lossy: off until a plan is named; `explain` lists each call with the
error that its heads had on the plan's held-out data.

Sources: MoA (Fu et al. 2024), arXiv:2406.14909, for the spans; StreamingLLM (Xiao et al. 2024),
arXiv:2309.17453, for the sinks.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from memopt._torch import size_hint
from memopt.attention.layers import LayerSpans, signature, visible
from memopt.attention.plan import SpanPlan
from memopt.emit import shape_of
from memopt.errors import ConfigError, PlanError
from memopt.graph import source_line
from memopt.kernels.banded_attention import ATTENTION
from memopt.passes.attentions import ATTEND, HEADS, TOKENS, Attention, is_written_out
from memopt.passes.modules import module_paths, path_of
from memopt.passes.spanned_calls import banded, padding_of, reason_against, scale_of
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_OF_PADDING = "; results at tokens that the mask hides mean nothing"
_WIDENED = 128  # keys that a kernel reads for a query besides its span: blocks of rows share them
# From how many keys on, and below which share of the products of full attention, spans save time:
# measured on the CPU; a GPU starts as many kernels. One query is bound by starting them.
_PREFILL, _ONE_QUERY = (1024, 0.9), (4096, 0.45)

Known = Mapping[tuple[tuple[str, ...], int], LayerSpans]


@dataclass(frozen=True)
class SparseAttention:
    """``sdpa(q, k, v, is_causal)`` -> ``memopt::banded_attention(q, k, v, spans, sinks)``.

    Attributes:
        plan: a `memopt.attention.SpanPlan`, its JSON, or the path of a file with it; None for no
            sparse attention.
        always: whether to do so even where nothing is saved, as to see what a plan loses.

    Raises:
        ConfigError: a value is of another type.
        PlanError: there is no such file, or it is no plan of spans.
    """

    name: ClassVar[str] = "sparse_attention"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    plan: Any = None
    always: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.plan, SpanPlan | str | None):
            raise ConfigError(
                f"option 'plan' of pass {self.name!r} = {self.plan!r}: allowed is a SpanPlan, "
                "or the path of a file that SpanPlan.save has written"
            )
        if not isinstance(self.always, bool):
            raise ConfigError(
                f"option 'always' of pass {self.name!r} = {self.always!r}: "
                "allowed is True or False"
            )
        if isinstance(self.plan, str):
            read = SpanPlan.from_json if self.plan.lstrip().startswith("{") else SpanPlan.load
            object.__setattr__(self, "plan", read(self.plan))

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        if self.plan is None:
            if self.name in ctx.config.passes:
                raise PlanError(
                    f"pass {self.name!r} needs a plan: options={{'passes': {{{self.name!r}: "
                    "{'plan': 'plan.json'}}}; memopt.attention.calibrate makes one"
                )
            return 0
        known = _known(self.plan)
        nodes = [n for n in graph.nodes if n.target in (ATTEND, ATTENTION)]
        made = Counter(module_paths(n)[0] for n in nodes if not is_written_out(n))
        calls: Counter[tuple[str, ...]] = Counter()
        warned: dict[str, None] = {}
        rewrites = 0
        for node in nodes:
            paths = module_paths(node)
            written_out = is_written_out(node)
            index, calls[paths[0]] = calls[paths[0]], calls[paths[0]] + (not written_out)
            if node.target is ATTENTION:  # has a window of its own
                continue
            attention = Attention.of(node)
            reason, padding = reason_against(attention), padding_of(attention)
            if not reason and written_out:
                reason = "the model writes it out, and a plan is of calls of attention"
            if not reason:
                layer = self._layer(known, attention, paths, index)
                reason = _reason_of_others(known, layer, made[paths[0]], warned)
                reason = reason or self._reason_for_all(attention, layer, warned)
            if not reason:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(banded(graph, attention, layer, self.plan.sinks))
                graph.erase_node(node)
                rewrites += 1
            text = f"it attends in full: {reason}"
            if not reason:
                text = _loss(layer, self.plan) + (_OF_PADDING if padding else "")
            kind = RemarkKind.MISSED if reason else RemarkKind.APPLIED
            ctx.remark(self.name, kind, text, node.name, source_line(node))
        for text in warned:
            warnings.warn(f"memopt pass {self.name!r}: {text}", stacklevel=2)
        return rewrites

    def _layer(
        self, known: Known, attention: Attention, paths: list[tuple[str, ...]], index: int
    ) -> LayerSpans:
        """What the plan says of a call: (2).

        Raises:
            PlanError: it says nothing of it, or of one with other heads.
        """
        layer = next((known[path, index] for path in paths if (path, index) in known), None)
        where = f"call {index} of attention in module {'.'.join(paths[0])!r}"
        again = f"the plan is for the model {self.plan.fingerprint}: calibrate this one"
        if paths == [()]:
            again += (
                ", or, where the graph begins within that module, as behind a graph break, remove "
                "the break: TORCH_LOGS=graph_breaks names it"
            )
        if layer is None:
            raise PlanError(f"the plan of pass {self.name!r} does not know {where}; {again}")
        query: Any = shape_of(attention.arguments["query"])
        seen = signature(query[HEADS], query[3], scale_of(attention))
        heads = shape_of(attention.key)[HEADS]
        if seen != layer.signature or heads % layer.heads:
            raise PlanError(
                f"{where} has {heads} heads of keys and {seen}, and in the plan of pass "
                f"{self.name!r} {layer.heads} of keys and {layer.signature}; {again}"
            )
        return layer

    def _reason_for_all(
        self, attention: Attention, layer: LayerSpans, warned: dict[str, None]
    ) -> str:
        """Why a call that could be rewritten is not, or ``""``."""
        if not layer.rules:
            return "it was not causal self-attention where the plan was made"
        if layer.is_full():
            return "the plan says so"
        n = shape_of(attention.key)[TOKENS]
        # Comparing a size that is a symbol guards it: other lengths are compiled anew. (3)
        if n < self.plan.shortest or n > self.plan.longest:
            text = (
                f"{size_hint(n)} tokens are not {self.plan.shortest} to {self.plan.longest}, "
                "which the plan was made for"
            )
            warned[f"{text}: attention is computed in full"] = None
            return text
        return "" if self.always else self._reason_to_save_none(attention, layer)

    def _reason_to_save_none(self, attention: Attention, layer: LayerSpans) -> str:
        """Why spans would save no time, or ``""``: (4)."""
        n, sinks = shape_of(attention.key)[TOKENS], self.plan.sinks
        length, is_one = size_hint(n), shape_of(attention.arguments["query"])[TOKENS] == 1
        least, most = _ONE_QUERY if is_one else _PREFILL
        if n < least:  # of a symbol, a guard as well
            return f"of fewer than {least} keys it is as fast"
        spans = layer.spans(length)
        if is_one:
            share = sum(min(span + sinks, length) for span in spans) / (length * len(spans))
        else:
            wide = [min(span + _WIDENED, length) for span in spans]
            seen = sum(visible(span, sinks, length) for span in wide)
            share = seen / (len(spans) * visible(length, 0, length))
        return "" if share <= most else f"its spans leave {1 - share:.0%} out, which saves nothing"


def _known(plan: SpanPlan) -> Known:
    """The plan's layers, by path and by which of their module's calls they are."""
    split = [(layer.name.partition("#"), layer) for layer in plan.layers]
    return {(path_of(name), int(index or 0)): layer for (name, _, index), layer in split}


def _reason_of_others(known: Known, layer: LayerSpans, made: int, warned: dict[str, None]) -> str:
    """Why it is not known which of its module's calls a call is, or ``""``."""
    module = layer.name.partition("#")[0]
    calls = sum(path == path_of(module) for path, _ in known)
    if made >= calls:
        return ""
    text = f"{made} of the {calls} calls of attention in module {module!r} are in the graph"
    warned[
        f"{text}, and which is not known: attention is computed in full; remove the graph break "
        "that parts them, which TORCH_LOGS=graph_breaks names"
    ] = None
    return text


def _loss(layer: LayerSpans, plan: SpanPlan) -> str:
    """What is lost at a call, as the plan has measured."""
    errors = ", ".join(f"{error:.1e}" for error in layer.errors)
    rules = ", ".join(map(repr, dict.fromkeys(layer.rules)))
    return (
        f"its heads of keys see {rules} and {plan.sinks} sinks: they are off by {errors}, and "
        f"all layers together raise the held-out loss by {plan.loss_change:.2%}"
    )
