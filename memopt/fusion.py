"""Keeps Inductor from undoing the schedule by fusing what is far apart.

Inductor merges loops that read the same buffer even when many steps lie between them. In a
backward that recomputes layer by layer, that merges the recomputation of many layers into one
early kernel (they all read the same rotary table, say), and every result is held from then on.
"""

from typing import Any

from memopt._torch import InductorChoices

# Steps of the schedule that a horizontally fused kernel may span. Inductor allows 64.
MAX_SPAN = 16


class NearbyFusion(InductorChoices):
    """Inductor's own choices, with a bound on how far apart siblings may lie."""

    @staticmethod
    def can_fuse_horizontal(
        scheduler: Any, node1: Any, node2: Any, shared_data_score: int
    ) -> bool:
        """Refuse siblings whose merged kernel would span more than ``MAX_SPAN`` steps."""
        span = max(node1.max_order, node2.max_order) - min(node1.min_order, node2.min_order)
        if span > MAX_SPAN:
            return False
        allowed: bool = InductorChoices.can_fuse_horizontal(
            scheduler, node1, node2, shared_data_score
        )
        return allowed
