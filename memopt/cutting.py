"""How many pieces wide values are computed in: the fewest that fit, or those with the lowest peak.

Pieces are tried, planned and measured by the model; what each pass that cuts would try next
depends on the last trial alone.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from memopt._torch import NodeInfo, copy_graph
from memopt.cutters import Cutter, Regions, Trial
from memopt.memory.liveness import Liveness
from memopt.outcome import Outcome
from memopt.pipeline import PassContext, configure
from memopt.remarks import RemarkKind

# Pieces are smaller products, and are put together in the end: a gain below this is not worth it.
_WORTH_A_CUT = 0.99
_PATIENCE = 3  # trials in a row without such a gain


@dataclass(frozen=True)
class Traced:
    """A graph as it was traced, or cut.

    Attributes:
        gm: the graph.
        static: positions of inputs that never move.
        num_fwd_outputs: how many results are the forward's.
        cutter: what cuts it.
        pieces: how it was cut, as in `Plan`.
        regions: what that made of what.
    """

    gm: fx.GraphModule
    static: list[int]
    num_fwd_outputs: int
    cutter: Cutter
    pieces: Mapping[str, int] = field(default_factory=dict)
    regions: Regions = field(default_factory=dict)

    def cut(self, pieces: Mapping[str, int]) -> "Traced":
        """A copy, cut."""
        gm = fx.GraphModule(self.gm, copy_graph(self.gm.graph))
        regions = self.cutter(gm.graph, pieces)
        gm.recompile()
        return replace(self, gm=gm, pieces=pieces, regions=regions)


@dataclass(frozen=True)
class Draft:
    """A graph with a plan for it."""

    traced: Traced
    info: NodeInfo
    outcome: Outcome

    @property
    def liveness(self) -> Liveness:
        """Of the plan."""
        return self.outcome.chosen.liveness


Plan = Callable[[Traced, PassContext, Outcome | None], Draft]
"""Plans a graph, given where to speak and what came of it before it was cut."""


@dataclass(frozen=True)
class Cutting:
    """The search for pieces.

    Attributes:
        plan: plans each trial.
        ctx: the options, and where the search speaks.
    """

    plan: Plan
    ctx: PassContext

    def search(self, traced: Traced, uncut: Draft) -> Draft:
        """The plan of the fewest pieces that fit, or of those with the lowest peak.

        Args:
            traced: the graph, as it was traced.
            uncut: its plan in one piece.
        """
        start = time.perf_counter()
        cutter = configure(traced.cutter, self.ctx.config)
        if not self.is_asked_for(uncut) or not self.ctx.config.enabled(cutter.name):
            return uncut
        traced = replace(traced, cutter=cutter)
        best = trial = uncut
        try:
            trial = replace(uncut, traced=traced.cut({}))
            misses = 0
            while self.is_asked_for(best) and misses < _PATIENCE:
                pieces = cutter.more(self._trial(traced, trial))
                if not pieces:
                    break
                unheard = PassContext(self.ctx.config)  # what it would say has been said
                trial = self.plan(traced.cut(pieces), unheard, uncut.outcome)
                misses += 1
                if trial.liveness.peak_bytes <= _WORTH_A_CUT * best.liveness.peak_bytes:
                    best, misses = trial, 0
        except Exception as error:
            if self.ctx.config.strict:
                raise
            text = f"left alone: it raised {type(error).__name__}: {error}"
            self.ctx.remark(cutter.name, RemarkKind.MISSED, text)
        seconds = uncut.outcome.seconds + time.perf_counter() - start
        return replace(best, outcome=replace(best.outcome, seconds=seconds))

    def is_asked_for(self, draft: Draft) -> bool:
        """Whether pieces are: where nothing fits, and for the lowest peak."""
        kind = self.ctx.config.memory_budget.kind
        return kind == "min" or (kind != "none" and not draft.outcome.fits)

    def say(self, draft: Draft) -> None:
        """What is cut."""
        cutter = draft.traced.cutter
        for name, pieces in draft.outcome.cut.items():
            text = f"{cutter.covers} {name} is computed in {pieces} pieces of its rows"
            self.ctx.remark(cutter.name, RemarkKind.APPLIED, text)

    def _trial(self, traced: Traced, draft: Draft) -> Trial:
        limit = None if self.ctx.config.memory_budget.kind == "min" else draft.outcome.limit_bytes
        own = draft.traced
        return Trial(traced.gm.graph, own.pieces, own.regions, draft.liveness, limit)
