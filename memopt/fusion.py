"""Keeps Inductor from undoing the schedule by fusing what is far apart.

Inductor merges loops into one kernel whatever lies between them: readers of one buffer, such as
the rotary table that every recomputed layer reads, or a producer and a consumer many layers
later. Everything that the merged kernel reads and writes is alive at once, so the merge can lift
the peak that the plan relies on. Under a budget, loops merge only where no library call lies
between them; that is also what the planner's model of the lowering assumes.
"""

import bisect
import weakref
from typing import Any

from memopt._torch import InductorChoices

_CALLS: "weakref.WeakKeyDictionary[Any, list[int]]" = weakref.WeakKeyDictionary()


class NearbyFusion(InductorChoices):
    """Inductor's own choices, within one stretch of loops."""

    @staticmethod
    def can_fuse_vertical(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        """Refuse a consumer that lies behind a library call."""
        return not _call_between(scheduler, node1, node2) and bool(
            InductorChoices.can_fuse_vertical(scheduler, node1, node2, shared_data_score)
        )

    @staticmethod
    def can_fuse_horizontal(
        scheduler: Any, node1: Any, node2: Any, shared_data_score: int
    ) -> bool:
        """Refuse siblings with a library call between them."""
        return not _call_between(scheduler, node1, node2) and bool(
            InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)
        )


def _call_between(scheduler: Any, node1: Any, node2: Any) -> bool:
    """Whether a library call lies inside the stretch of the schedule that the two span."""
    if scheduler not in _CALLS:
        _CALLS[scheduler] = sorted(
            node.min_order for node in scheduler.nodes if node.is_extern() or node.is_template()
        )
    calls = _CALLS[scheduler]
    first: int = min(node1.min_order, node2.min_order)
    last: int = max(node1.max_order, node2.max_order)
    return bisect.bisect_right(calls, first) < bisect.bisect_left(calls, last)
