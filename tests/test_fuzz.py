"""Broken inputs by the thousand; `python -m tests.fuzz` runs others, and shows what they say."""

import os

import pytest

from tests.fuzz.cases import KINDS, spread
from tests.fuzz.worker import Outcome, run_cases


def problems(count: int, seed: int, processes: int) -> list[str]:
    """What must not be: a crash, a hang, a traceback, an error without its sentence."""
    outcomes: list[Outcome] = list(run_cases(spread(count, list(KINDS)), seed, processes))
    assert len(outcomes) == count
    # Damage that nothing noticed, or that everything did, would test little.
    fine = sum(outcome.code == 0 for outcome in outcomes)
    assert count * 0.1 < fine < count * 0.8
    return [f"{o.kind} {o.case} of seed {seed}: {o.problem}" for o in outcomes if o.problem]


def test_two_hundred_broken_inputs() -> None:
    assert problems(200, seed=0, processes=1) == []


@pytest.mark.slow
def test_two_thousand_broken_inputs() -> None:
    assert problems(2000, seed=1, processes=min(2, os.cpu_count() or 1)) == []
