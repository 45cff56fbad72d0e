"""What earlier graphs hold: from their forward to their backward, and not a moment longer."""

import torch

from memopt.memory.ledger import Crowded, Ledger
from tests.lazy_uses import square


def scale(x: torch.Tensor) -> list[torch.Tensor]:
    """Saves its input, as a compiled forward does."""
    return [square(x)]


def leaf() -> torch.Tensor:
    return torch.ones(3, requires_grad=True)


def test_a_forward_holds_its_bytes_until_its_backward_ran() -> None:
    ledger = Ledger()
    run = ledger.tracked(scale, 100, 120, 0)
    assert ledger.held_bytes() == 0
    (y,) = run(leaf())
    assert ledger.held_bytes() == 100
    y.sum().backward()
    assert ledger.held_bytes() == 0


def test_forwards_in_flight_add_up() -> None:
    ledger = Ledger()
    first, second = ledger.tracked(scale, 100, 120, 0), ledger.tracked(scale, 30, 30, 0)
    (x,), (y,) = first(leaf()), second(leaf())
    assert (ledger.held_bytes(), ledger.most_held_bytes()) == (130, 150)
    x.sum().backward()
    assert (ledger.held_bytes(), ledger.most_held_bytes()) == (30, 30)
    y.sum().backward()
    assert ledger.held_bytes() == 0


def test_an_abandoned_forward_is_forgotten() -> None:
    ledger = Ledger()
    result = ledger.tracked(scale, 100, 120, 0)(leaf())
    assert ledger.held_bytes() == 100
    del result
    assert ledger.held_bytes() == 0


def test_what_only_a_cycle_keeps_is_released() -> None:
    ledger = Ledger()
    cycle: list[object] = ledger.tracked(scale, 100, 120, 0)(leaf())
    cycle.append(cycle)
    del cycle
    assert ledger.held_bytes() == 0


def test_a_retained_graph_still_holds_its_bytes() -> None:
    ledger = Ledger()
    (y,) = ledger.tracked(scale, 100, 120, 0)(leaf())
    y.sum().backward(retain_graph=True)
    assert ledger.held_bytes() == 100


def test_without_gradients_nothing_is_held() -> None:
    ledger = Ledger()
    with torch.no_grad():
        result = ledger.tracked(scale, 100, 120, 0)(leaf())
    assert len(result) == 1
    assert ledger.held_bytes() == 0


def test_the_peak_of_an_earlier_backward_counts_what_a_later_graph_leaves_behind() -> None:
    ledger = Ledger()
    assert ledger.earlier_peak_bytes(7) == 0
    (y,) = ledger.tracked(scale, 100, 120, 500)(leaf())
    assert ledger.earlier_peak_bytes(7) == 507
    y.sum().backward()
    assert ledger.earlier_peak_bytes(7) == 0


def test_more_runs_than_there_is_room_for_are_told_once() -> None:
    ledger, told = Ledger(), list[int]()
    run = ledger.tracked(scale, 100, 120, 0, Crowded(2, told.append))
    for _ in range(3):  # steps whose results are held on to, but not what they saved
        results = [run(leaf())[0] for _ in range(2)]
        sum(y.sum() for y in results).backward()
    assert told == []
    results = [run(leaf())[0] for _ in range(4)]
    assert told == [3]
