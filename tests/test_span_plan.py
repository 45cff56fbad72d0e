"""Plans of spans as data: files that come back, and files that are none."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.attention import FULL, Elastic, SpanPlan
from memopt.attention.layers import visible
from memopt.attention.plan import KIND
from memopt.attention.rules import distinct, from_dict
from memopt.errors import ConfigError, PlanError
from memopt.stored import signature
from tests.span_models import HALF, SHORT, plan_for

PLAN = plan_for(
    ("layers.0", 4, 2, 16, (SHORT, HALF)),
    ("layers.1", 4, 2, 16, (FULL, FULL)),
    ("encoder.0", 4, 4, 8, ()),
)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    assert SpanPlan.load(PLAN.save(tmp_path / "plan.json")) == PLAN
    assert SpanPlan.from_json(PLAN.to_json()).to_json() == PLAN.to_json()


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 8)), min_size=1, max_size=2),
    st.floats(0, 10),
    st.integers(0, 64),
)
def test_any_plan_comes_back(rules: list[tuple[int, int]], error: float, sinks: int) -> None:
    own = tuple(Elastic(*rule) for rule in rules)
    plan = plan_for(("a", 2 * len(own), len(own), 8, own), sinks=sinks)
    layer = dataclasses.replace(plan.layers[0], errors=(error,) * len(own))
    plan = dataclasses.replace(plan, layers=(layer,))
    assert SpanPlan.from_json(plan.to_json()) == plan


@given(st.integers(0, len(PLAN.to_json()) - 1))
def test_a_file_that_was_cut_off_is_no_plan(at: int) -> None:
    with pytest.raises(PlanError):
        SpanPlan.from_json(PLAN.to_json()[:at])


@given(st.integers(0, len(PLAN.to_json()) - 1), st.characters(min_codepoint=32, max_codepoint=126))
def test_a_file_that_was_edited_is_no_plan(at: int, new: str) -> None:
    text = PLAN.to_json()
    edited = text[:at] + new + text[at + 1 :]
    try:
        same = json.loads(edited) == json.loads(text)
    except json.JSONDecodeError:
        same = False
    if same:
        assert SpanPlan.from_json(edited) == PLAN
    else:
        with pytest.raises(PlanError):
            SpanPlan.from_json(edited)


def signed(change: Any) -> str:
    """A plan that someone changed and signed again."""
    body = json.loads(PLAN.to_json())
    del body["hash"]
    change(body)
    return json.dumps({**body, "hash": signature(body)})


def without(name: str) -> Any:
    return lambda body: body.pop(name)


def of_layer(name: str, value: Any) -> Any:
    return lambda body: body["layers"][0].update({name: value})


def of_plan(name: str, value: Any) -> Any:
    return lambda body: body.update({name: value})


RULE = {"kind": "elastic", "alpha": 8, "eighths": 0}


@pytest.mark.parametrize(
    "change",
    [
        *map(without, ("layers", "sinks", "losses", "lengths", "budget", "data_hash")),
        of_layer("rules", [RULE]),
        of_layer("rules", [RULE, RULE | {"kind": "spiral"}]),
        of_layer("rules", [RULE, RULE | {"alpha": -1}]),
        of_layer("rules", [RULE, RULE | {"alpha": 1.5}]),
        of_layer("rules", [RULE, RULE | {"beta": 1}]),
        of_layer("rules", ["elastic", RULE]),
        of_layer("heads", 3),
        of_layer("heads", 0),
        of_layer("heads", True),
        of_layer("name", None),
        of_layer("scale", "1"),
        of_layer("errors", [math.nan, 0.0]),
        of_layer("errors", [10**400, 0.0]),
        of_layer("query_heads", 8),
        of_plan("layers", {}),
        of_plan("layers", [3]),
        of_plan("lengths", []),
        of_plan("losses", [{}]),
        of_plan("sinks", -1),
        of_plan("fingerprint", "0" * 16),
    ],
)
def test_a_field_that_cannot_be_is_an_error(change: Any) -> None:
    with pytest.raises(PlanError):
        SpanPlan.from_json(signed(change))


def test_more_than_two_rules_in_a_layer_are_an_error() -> None:
    three = plan_for(("a", 3, 3, 8, (SHORT, HALF, FULL)))
    with pytest.raises(PlanError, match="more than 2 rules"):
        SpanPlan.from_json(three.to_json())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[]", "its kind is 'list'"),
        ("{}", "its kind is None"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({"schema": 2, "fingerprint": "", "saved": []}), "its kind is None"),
        (json.dumps({"kind": KIND, "schema": 99}), "schema is 99"),
        (json.dumps({"kind": KIND, "schema": 1}), "was changed"),
    ],
)
def test_a_foreign_file_is_told_from_a_plan(text: str, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        SpanPlan.from_json(text)


def test_a_file_that_is_no_text_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read the plan"):
        SpanPlan.load(path)


def test_a_plan_is_printed_with_every_layer_and_length() -> None:
    text = str(PLAN)
    for part in ("layers.0", "encoder.0", "left alone", "+1.00%", "2.5e-01", PLAN.fingerprint):
        assert part in text


def test_a_plan_is_drawn(tmp_path: Path) -> None:
    path = PLAN.plot(tmp_path / "spans.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        PLAN.plot(tmp_path / "spans.txt")


@pytest.mark.parametrize("n", [1, 7, 24])
def test_what_a_head_sees_is_counted(n: int) -> None:
    for span in range(1, n + 1):
        for sinks in range(n + 2):
            seen = sum(i - j < span or j < sinks for i in range(n) for j in range(i + 1))
            assert visible(span, sinks, n) == seen


def test_density_is_the_share_of_keys_that_the_last_query_reads() -> None:
    n = 64
    read = (8 + 4) + (4 + 32 + 4) + n + n
    assert PLAN.density(n) == pytest.approx(read / (4 * n))
    assert PLAN.computed(n) == pytest.approx(
        (visible(8, 4, n) + visible(36, 4, n) + 2 * visible(n, 0, n)) / (4 * visible(n, 0, n))
    )


@given(st.integers(0, 10_000), st.integers(0, 8), st.integers(1, 10**6))
def test_elastic_spans_are_rounded_up(alpha: int, eighths: int, n: int) -> None:
    assert Elastic(alpha, eighths).span(n) == alpha + math.ceil(eighths * n / 8)
    assert FULL.span(n) == n


def test_rules_that_agree_at_all_lengths_are_one() -> None:
    rules = distinct(Elastic.candidates([64, 128], 4), [64, 128])
    spans = [tuple(min(rule.span(n), n) for n in (64, 128)) for rule in rules]
    assert len(set(spans)) == len(spans)
    assert rules[0] == FULL
    assert min(map(min, spans)) > 0


def test_a_rule_of_another_kind_is_an_error() -> None:
    with pytest.raises(PlanError, match="known kinds are"):
        from_dict({"kind": ["elastic"]})


def test_a_plan_without_rules_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layer of the plan has rules"):
        plan_for(("a", 4, 2, 8, ())).plot(tmp_path / "plan.png")
