"""Copies beside a step: against a step that runs, waits and copies as the graphs say."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from memopt.memory.transfers import Stay, Trip, schedule_trips


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[float], int, list[Trip]]:
    """Seconds of some steps, where the backward begins, and values that go and come."""
    ahead = draw(st.integers(1, 6))
    behind = draw(st.integers(1, 6))
    seconds = draw(
        st.lists(
            st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=ahead + behind, max_size=ahead + behind
        )
    )
    trips = draw(
        st.lists(
            st.builds(
                Trip,
                seconds=st.sampled_from([0.01, 0.5, 1.0, 2.5, 16.0]),
                made=st.integers(0, ahead - 1),
                read=st.integers(ahead, ahead + behind - 1),
            ),
            max_size=5,
        )
    )
    return seconds, ahead, trips


def run(
    seconds: Sequence[float],
    boundary: int,
    trips: Sequence[Trip],
    stays: Sequence[Stay],
) -> float:
    """Seconds that the step takes: each engine works through its queue, the step waits for it."""
    clock = out_engine = back_engine = 0.0
    out_ends: dict[int, float] = {}
    back_ends: dict[int, float] = {}
    by_read = sorted(range(len(trips)), key=lambda i: (trips[i].read, i))
    for step, own in enumerate(seconds):
        for i in by_read:
            if stays[i].first == step:
                back_engine = max(back_engine, clock) + trips[i].seconds
                back_ends[i] = back_engine
        for i, trip in enumerate(trips):
            if trip.read == step:
                clock = max(clock, back_ends[i])
        clock += own
        for i, trip in enumerate(trips):
            if trip.made == step:
                out_engine = max(out_engine, clock) + trip.seconds
                out_ends[i] = out_engine
        for i, stay in enumerate(stays):
            if stay.last == step and step < boundary:
                clock = max(clock, out_ends[i])
    return clock


@given(steps())
def test_a_step_takes_no_longer_than_planned(
    drawn: tuple[list[float], int, list[Trip]],
) -> None:
    seconds, boundary, trips = drawn
    stays, waited = schedule_trips(seconds, boundary, trips)
    took = run(seconds, boundary, trips, stays)
    assert sum(seconds) - 1e-9 <= took <= sum(seconds) + waited + 1e-9


@given(steps())
def test_copies_leave_in_the_forward_and_come_back_in_the_backward(
    drawn: tuple[list[float], int, list[Trip]],
) -> None:
    seconds, boundary, trips = drawn
    stays, _ = schedule_trips(seconds, boundary, trips)
    for trip, stay in zip(trips, stays, strict=True):
        assert trip.made <= stay.last < boundary <= stay.first <= trip.read


@given(steps())
def test_a_link_without_end_costs_nothing_and_holds_nothing(
    drawn: tuple[list[float], int, list[Trip]],
) -> None:
    seconds, boundary, trips = drawn
    trips = [replace(trip, seconds=0.0) for trip in trips]
    stays, waited = schedule_trips(seconds, boundary, trips)
    assert waited == 0
    for trip, stay in zip(trips, stays, strict=True):
        assert sum(seconds[stay.first + 1 : trip.read]) == 0
        assert sum(seconds[trip.made + 1 : stay.last]) == 0


def test_one_copy_that_the_step_hides_and_one_that_it_does_not() -> None:
    seconds = [1.0, 4.0, 4.0, 1.0]
    (stay,), waited = schedule_trips(seconds, 2, [Trip(seconds=3.0, made=0, read=3)])
    assert (stay, waited) == (Stay(last=1, first=2), 0.0)
    _, waited = schedule_trips(seconds, 2, [Trip(seconds=6.0, made=0, read=3)])
    assert waited == 4.0  # two seconds too many in each direction
