"""Plans that were cut off, edited, of something else or no files: refused, or replayed."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import memopt
from memopt._torch import BackendCompilerFailed
from memopt.attention import SpanPlan
from memopt.backend import read_options
from memopt.errors import PlanError
from memopt.outcome import read_plan
from memopt.plan import Plan
from tests.graphs import assert_same, seeded
from tests.test_plan import PLAN as UNCUT
from tests.test_span_plan import PLAN as SPANS

PLAN = dataclasses.replace(UNCUT, chunk_rows={"linear_cross_entropy": 16}, cut={"mul": 2})
TEXT = PLAN.to_json()
READERS: dict[str, Callable[[str], object]] = {"plan": read_plan, "spans": SpanPlan.load}


def test_a_plan_that_was_cut_off_anywhere_is_no_plan() -> None:
    for at in range(len(TEXT)):
        with pytest.raises(PlanError):
            Plan.from_json(TEXT[:at])


@given(st.integers(0, len(TEXT) - 1), st.integers(0, 6))
@example(TEXT.index("tanh_1") - len('mm",\n  "'), 4)  # names out of their order
def test_a_plan_with_a_bit_flipped_is_another_plan_or_none(at: int, bit: int) -> None:
    flipped = TEXT[:at] + chr(ord(TEXT[at]) ^ 1 << bit) + TEXT[at + 1 :]
    try:
        plan = Plan.from_json(flipped)
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.peak_bytes >= 0


WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    "3",
    [],
    {},
    [1],
    {"mm": 1.5},
    {"mm": -1},
    {"mm": None},
    float("nan"),
)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("fingerprint", (str,)),
        ("saved", (list,)),
        ("peak_bytes", (int,)),
        ("seconds", (int, float)),
        ("budget_bytes", (int, type(None))),
        ("solver", (str,)),
        ("chunk_rows", (dict,)),
        ("cut", (dict,)),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_refused(
    name: str, allowed: tuple[type, ...]
) -> None:
    body = json.loads(TEXT)
    for value in WRONG:
        if type(value) in allowed and repr(value) in ("None", "1.5", "'3'", "[]", "{}"):
            continue
        with pytest.raises(PlanError, match="malformed"):
            Plan.from_json(json.dumps({**body, name: value}))
    if name != "cut":  # which earlier plans have not
        del body[name]
        with pytest.raises(PlanError, match=name):
            Plan.from_json(json.dumps(body))


@pytest.mark.parametrize("number", ["1e999", "-Infinity", "NaN", "1" * 5000])
@pytest.mark.parametrize("name", ["peak_bytes", "seconds", "budget_bytes"])
def test_a_number_that_is_none_is_refused(name: str, number: str) -> None:
    marked = json.dumps({**json.loads(TEXT), name: "?"})
    with pytest.raises(PlanError):
        Plan.from_json(marked.replace('"?"', number))


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def nothing(path: Path) -> None:
    pass


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def an_empty_file(path: Path) -> None:
    path.touch()


def a_large_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**8)


def deep_nesting(path: Path) -> None:
    path.write_text("[" * 10**6)


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00" + bytes(range(256)))


FILES = (a_folder, a_pipe, nothing, a_loop, an_empty_file, a_large_file, deep_nesting, no_text)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", FILES)
def test_what_is_no_plan_is_refused_by_name_or_for_its_text(
    make: Callable[[Path], None], reader: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    make(path)
    with pytest.raises(PlanError, match="plan"):
        READERS[reader](str(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("path", ["/dev/zero", "a\0b", "x" * 5000, "\udcff", "/dev/null/plan"])
def test_a_path_of_no_file_is_refused(path: str, reader: str) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        READERS[reader](path)


def test_the_plan_of_one_kind_is_none_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    SPANS.save(path)
    with pytest.raises(PlanError, match="plan again"):
        read_plan(str(path))
    path.write_text(TEXT)
    with pytest.raises(PlanError, match="not a plan of spans"):
        read_options({"passes": {"sparse_attention": {"plan": str(path)}}})


def classified(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
    """A head with a chunked loss, behind a layer that is dropped out."""
    h = F.dropout((x @ x).tanh(), 0.5, training=True).sigmoid()
    return (F.cross_entropy(F.linear(h, w), torch.arange(16) % 7) + (h @ h).sin().sum(),)


def by_memopt(**options: object) -> Callable[..., Any]:
    torch._dynamo.reset()
    own: Any = {"lowering": "eager", "strict": True, **options}
    return torch.compile(classified, backend="memopt", options=own)


@functools.cache
def replayed() -> tuple[Plan, tuple[str, ...]]:
    """A plan of that function, and the names of values of its joint graph."""
    options = {"lowering": "eager", "memory_budget": "min"}
    (graph,) = memopt.explain(classified, *arguments(), options=options).graphs
    assert graph.plan is not None
    return graph.plan, tuple({row.name for row in graph.decisions} | {*graph.plan.saved})


def assert_is_plan_error(error: object) -> None:
    assert isinstance(error, PlanError), error


def arguments() -> list[torch.Tensor]:
    torch.manual_seed(5)
    square = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    return [square, torch.randn(300, 16, dtype=torch.float64, requires_grad=True)]


@pytest.mark.parametrize("number", range(6))
def test_a_plan_edited_into_another_one_gives_the_same_numbers(
    number: int, tmp_path: Path
) -> None:
    """Whatever it says to save, to cut and to chunk; what cannot be done is refused."""
    plan, names = replayed()
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(number))
    saved = tuple(names[i] for i in chosen[: 4 * number])
    rows = dict.fromkeys(plan.chunk_rows, (0, 1, 5, 16, 10**9, 3)[number])
    cut = {names[i]: 2 + number for i in chosen[:number]} | {"no_such_name": 2}
    assert rows, "the loss is not chunked"
    path = tmp_path / "plan.json"
    for edited in (
        dataclasses.replace(plan, saved=saved, chunk_rows=rows, cut={}),
        dataclasses.replace(plan, cut=cut),
    ):
        path.write_text(edited.to_json())
        expected = seeded(classified, arguments())
        try:
            actual = seeded(by_memopt(plan=str(path)), arguments())
        except BackendCompilerFailed as error:  # cut otherwise it is another graph
            assert_is_plan_error(error.inner_exception)
        else:
            assert_same(actual, expected)
