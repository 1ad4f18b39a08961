"""Turns against a clock of the test's own: how long chunks are, and whose timings count."""

from typing import Any

import pytest

from dflash_mlx.server import scheduler
from dflash_mlx.server.scheduler import Scheduler

CYCLE = 0.05  # seconds


class Clock:
    """Seconds that pass only when somebody works."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Fake:
    """A sequence whose prefill runs at a pace, and gets slower behind a longer context."""

    def __init__(self, turns: Scheduler, clock: Clock, prompt: int, pace: float, cycles: int):
        self.turns, self.clock, self.prompt, self.pace = turns, clock, prompt, pace
        self.cycles, self.run_tokens, self.spoilt, self.fresh = cycles, 0, 0, True
        self.chunks: list[float] = []
        self.counted: list[bool] = []

    @property
    def prefilling(self) -> bool:
        return self.run_tokens < self.prompt

    def spoil(self) -> None:
        self.fresh = False

    def turn(self) -> bool:
        if self.prefilling:
            count = min(self.turns.chunk(), self.prompt - self.run_tokens)
            seconds = count / self.pace * (1 + self.run_tokens / 40_000)
            self.run_tokens += count
            self.chunks.append(seconds)
        else:
            seconds = CYCLE
            self.cycles -= 1
            self.counted.append(self.fresh)
        self.fresh = True
        self.clock.now += seconds
        return self.prefilling or self.cycles > 0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    return clock


def step(turns: Scheduler) -> Fake:
    sequence: Any = turns.next()
    if not turns.run(sequence):
        turns.remove(sequence)
    return sequence


def sequence(turns: Scheduler, clock: Clock, prompt: int, pace: float, cycles: int) -> Any:
    made: Any = Fake(turns, clock, prompt, pace, cycles)
    turns.add(made)
    return made


@pytest.mark.parametrize("pace", [8, 40, 300, 2_000, 50_000])
def test_chunks_take_two_seconds_at_most(clock, pace) -> None:
    turns = Scheduler(2048)
    alone = sequence(turns, clock, 12_000, pace, 1)
    while alone.prefilling:
        step(turns)
    assert max(alone.chunks) <= 2.0
    # They are as long as they may be, so that prefill is not held up by their number.
    assert len(alone.chunks) <= 3 + 12_000 / min(2048, pace)


def test_a_first_chunk_that_had_to_be_compiled_holds_up_nobody_for_long(clock) -> None:
    turns = Scheduler(2048)
    short = sequence(turns, clock, 2, 0.5, 1)
    while short in turns.sequences:
        step(turns)
    first = sequence(turns, clock, 16, 2, 1)
    while first in turns.sequences:
        step(turns)
    alone = sequence(turns, clock, 12_000, 2_000, 1)
    while alone.prefilling:
        step(turns)
    assert len(alone.chunks) <= 12


def test_those_who_decode_get_as_much_time_as_a_newcomers_prefill(clock) -> None:
    turns = Scheduler(2048)
    decoding = [sequence(turns, clock, 1, 1000, 2000) for _ in range(2)]
    for _ in range(40):
        step(turns)
    newcomer = sequence(turns, clock, 6000, 1000, 5)
    begun, longest, since = clock.now, 0.0, clock.now
    while newcomer.prefilling:
        before = clock.now
        if step(turns) is decoding[0]:
            longest, since = max(longest, before - since), clock.now
    spent = clock.now - begun
    assert 0.9 * spent / 2 <= sum(newcomer.chunks) <= 1.2 * spent / 2
    # Nobody waits for the next cycle longer than a short chunk and the others' cycles take.
    assert longest <= turns.shared_chunk + 3 * CYCLE


def test_only_turns_behind_ones_own_teach_anything(clock) -> None:
    turns = Scheduler(2048)
    first = sequence(turns, clock, 1, 1000, 40)
    for _ in range(10):
        step(turns)
    assert all(first.counted[1:])
    second = sequence(turns, clock, 1, 1000, 10)
    while second in turns.sequences:
        step(turns)
    # While two alternate, none of their timings is that of a cycle behind another.
    assert not any(second.counted)
    shared = len(first.counted)
    step(turns)
    assert not first.counted[shared]
    for _ in range(5):
        step(turns)
    assert all(first.counted[shared + 1 :])
