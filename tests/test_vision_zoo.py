"""Scales behind convolutions in the zoo's models of images: each is tuned, or has a remark."""

from typing import Any

import pytest
from torch import nn

import memopt
from bench.zoo import MODELS
from memopt.passes.tune_norms import TuneNorms
from memopt.remarks import RemarkKind


def remarks(name: str, size: str) -> tuple[list[str], list[str], int]:
    """What was tuned and what was not, and how many norms have running statistics."""
    model, tensors = MODELS[name].make(size)
    inputs: dict[str, Any] = dict(tensors)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    options = {"memory_budget": "min", "lowering": "eager", "strict": True}
    report = memopt.explain(model, **inputs, options=options)
    said = [r for g in report.graphs for r in g.remarks if r.pass_name == TuneNorms.name]
    tuned, left = (
        [r.text for r in said if r.kind is kind]
        for kind in (RemarkKind.APPLIED, RemarkKind.MISSED)
    )
    return tuned, left, len(norms)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet50_frozen_norm", "tiny"),
        ("regnet", "tiny"),
        ("efficientnet", "tiny"),
        ("mobilenet_v2", "bench"),
    ],
)
def test_every_norm_behind_a_convolution_is_tuned(name: str, size: str) -> None:
    tuned, left, norms = remarks(name, size)
    assert len(tuned) + len(left) == norms
    assert len(tuned) > 3 * len(left)
    assert all("its weight has" in text for text in left)  # a weight larger than the map


def test_layer_scales_are_tuned_too() -> None:
    tuned, left, norms = remarks("convnext", "tiny")
    assert (len(tuned), left, norms) == (2, [], 0)


def test_frozen_norms_have_no_scale_to_tune() -> None:
    assert remarks("detr", "tiny") == ([], [], 0)
