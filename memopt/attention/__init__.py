"""Sparse attention by plan: how far each head of a model looks back, found on data.

``calibrate`` profiles a model and finds a ``SpanPlan``; the pass ``sparse_attention`` applies it.
"""

from memopt.attention.calibration import calibrate
from memopt.attention.layers import LayerSpans, LengthLoss
from memopt.attention.plan import SpanPlan
from memopt.attention.rules import FULL, Elastic
from memopt.errors import LossGuardError, PlanError

__all__ = [
    "FULL",
    "Elastic",
    "LayerSpans",
    "LengthLoss",
    "LossGuardError",
    "PlanError",
    "SpanPlan",
    "calibrate",
]
