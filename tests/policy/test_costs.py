"""What the policy learns of costs."""

import pytest

from dflash_mlx.policy import Costs, Cycle, Kind, Lap, Learned


def lap(seconds: float, verified: int | None = None, kind: Kind | None = None) -> Cycle:
    usual = Kind.PLAIN if verified is None else Kind.DRAFTED
    return Cycle(10, Lap(seconds, kind or usual), 0 if verified is None else 7, verified or 0)


def test_a_plain_step_is_never_believed_dearer_than_a_drafted_cycle():
    costs = Costs(7)
    for _ in range(50):
        costs.observe(lap(0.506))
        costs.observe(lap(0.371, 0))
        costs.observe(lap(0.400, 1))
    assert min(costs.steps()) > 1


def test_what_one_length_costs_may_change():
    costs = Costs(7)
    for seconds in (2.0, 4.0):
        for _ in range(300):
            costs.observe(lap(1.0))
            costs.observe(lap(seconds, 5))
        assert costs.steps()[5] == pytest.approx(seconds, rel=0.1)


def test_a_machine_that_slows_down_as_a_whole_changes_no_ratio():
    costs = Costs(7)
    for factor in (1.0, 3.0):
        for _ in range(40):
            costs.observe(lap(0.03 * factor))
            costs.observe(lap(0.06 * factor, 5))
        assert costs.steps()[5] == pytest.approx(2.0, rel=0.1)
        assert costs.plain == pytest.approx(0.03 * factor, rel=0.1)


def test_lengths_learn_from_their_neighbours():
    costs = Costs(15)
    for _ in range(40):
        costs.observe(lap(1.0))
        costs.observe(lap(4.0, 7))
    assert costs.steps()[7] == pytest.approx(4.0, rel=0.05)
    assert 3.0 < costs.steps()[6] < 4.5 and 3.5 < costs.steps()[9] < 6.0


def test_costs_behind_a_longer_context_begin_with_the_nearest_known():
    learned = Learned(7)
    for _ in range(40):
        learned.at(100).costs.observe(lap(1.0))
        learned.at(100).costs.observe(lap(3.0, 3))
    assert learned.at(5000).costs.steps()[3] == pytest.approx(3.0, rel=0.05)
    for _ in range(100):
        learned.at(5000).costs.observe(lap(2.0))
        learned.at(5000).costs.observe(lap(18.0, 3))
    assert learned.at(5000).costs.steps()[3] == pytest.approx(9.0, rel=0.1)
    assert learned.at(100).costs.steps()[3] == pytest.approx(3.0, rel=0.05)


def test_what_reading_costs_is_told_from_what_the_verify_costs():
    costs = Costs(3)
    for _ in range(60):
        costs.observe(lap(1.0))
        costs.observe(lap(2.0, 1))
        costs.observe(lap(2.5, 1)._replace(read=True))
    assert costs.steps()[1] == pytest.approx(2.0, rel=0.05)
    assert costs.reading == pytest.approx(0.25, rel=0.2)


def test_laps_that_tell_nothing_teach_nothing():
    costs = Costs(3)
    costs.observe(lap(1.0))
    before = costs.seconds()
    costs.observe(lap(99.0, kind=Kind.VOID))
    assert costs.seconds() == before
