"""Sparse attention by plan: how far each head of a model looks back, found on data.

``calibrate`` profiles a model and finds a ``SpanPlan``; the pass ``sparse_attention`` applies it.
"""

from memopt.calibration import calibrate
from memopt.errors import LossGuardError, PlanError
from memopt.span_layers import LayerSpans, LengthLoss
from memopt.span_plan import SpanPlan
from memopt.span_rules import FULL, Elastic

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
