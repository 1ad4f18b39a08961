"""Simulated machines and texts: what a verify-length strategy would cost, without a model.

Everything is deterministic for a seed. A strategy is shown noisy times and is judged by the true
ones, counted in plain steps.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dflash_mlx.decode.cost import Costs
from dflash_mlx.decode.schedule import Cycle, VerifyLength


@dataclass(frozen=True, eq=False)
class Machine:
    """Costs in plain steps.

    Attributes:
        rows: verify cost by rows, some of them; others lie on straight lines between.
        draft: one draft forward.
        reading: a cycle's loss when confidences are read in the middle of it.
        drain: loss of the first plain step after a verify, which nothing could queue ahead.
        catch_up: projecting the features of one plain cycle when drafting goes on.
        per_row: what 1,000 tokens of context add to each row of a forward, the draft's included.
    """

    name: str
    rows: dict[int, float]
    draft: float
    reading: float = 0.04
    drain: float = 0.05
    catch_up: float = 0.005
    per_row: float = 0.0

    def verify(self, rows: int, context: int = 0) -> float:
        known = sorted(self.rows)
        right = min(max(bisect_left(known, rows), 1), len(known) - 1)
        a, b = known[right - 1], known[right]
        curve = self.rows[a] + (self.rows[b] - self.rows[a]) * (rows - a) / (b - a)
        return curve + rows * self.per_row * context / 1000

    def cycle(self, proposals: int, context: int = 0, block_size: int = 8) -> float:
        draft = self.draft * (1 + block_size * self.per_row * context / 1000)
        return draft + self.verify(proposals + 1, context)

    def seed(self, block_size: int, rng: random.Random, wrong: float = 0.0) -> Costs:
        """What a calibration would measure; `wrong` is the spread of its errors."""

        def measured(cost: float) -> float:
            return cost * rng.lognormvariate(0, wrong) if wrong else cost

        return Costs(
            measured(1.0),
            tuple(measured(self.cycle(m)) for m in range(block_size)),
            measured(self.reading),
        )


def scaled(curve: dict[int, float]) -> dict[int, float]:
    """Milliseconds by rows -> plain steps by rows."""
    return {rows: ms / curve[1] for rows, ms in curve.items()}


# The last five are other people's measurements, or between the bounds that they gave.
MACHINES = [
    Machine("flat", {1: 1.0, 16: 1.0}, 0.15),
    Machine("gentle slope", {1: 1.0, 16: 1.9}, 0.2),
    Machine("linear", {1: 1.0, 16: 16.0}, 0.2),
    Machine("cliff at 5 rows", {1: 1.0, 4: 1.1, 5: 1.9, 8: 2.2, 16: 3.2}, 0.12),
    Machine("costly draft, flat", {1: 1.0, 16: 1.2}, 1.0),
    Machine("costly draft, linear", {1: 1.0, 16: 12.0}, 1.0),
    Machine(
        "M5 Max 70B 4-bit", scaled({1: 76, 3: 85, 5: 108, 8: 168, 12: 242, 16: 296}), 0.08, 0.02
    ),
    Machine("M4 Pro 4-bit", {1: 1.0, 2: 1.14, 3: 1.36, 4: 1.4, 6: 1.8, 8: 2.2, 16: 4.4}, 0.15),
    Machine("M3 Ultra 4-bit", {1: 1.0, 2: 1.8, 4: 3.3, 8: 6.1, 16: 6.3}, 0.12),
    Machine("M3 Ultra bf16", {1: 1.0, 2: 2.0, 16: 2.0}, 0.12),
    Machine("2-core CPU", scaled({1: 7.8, 4: 10.5, 8: 13.2, 16: 20.0}), 0.33),
]


@dataclass(frozen=True)
class Passage:
    """Tokens that the draft guesses about equally well: `chance` on average, token by token."""

    tokens: int
    chance: float


class Text:
    """Which tokens a draft would guess, fixed for a seed, whatever the strategy does.

    Each token has a chance of its own around the passage's, and a draw that decides. Deeper
    proposals are a little worse. The confidence is a distorted, noisy view of the chance.
    """

    def __init__(self, passages: Sequence[Passage], length: int, rng: random.Random):
        self.length = length
        self.chances: list[float] = []
        while len(self.chances) < length + 32:
            for passage in passages:
                self.chances += [_spread(passage.chance, rng) for _ in range(passage.tokens)]
        self.draws = [rng.random() for _ in self.chances]
        self.noise = [rng.gauss(0, 0.1) for _ in self.chances]

    def chance(self, position: int, depth: int) -> float:
        return self.chances[position] * 0.985**depth

    def accepts(self, position: int, depth: int) -> bool:
        return self.draws[position] < self.chance(position, depth)

    def confidence(self, position: int, depth: int) -> float:
        chance = self.chance(position, depth)
        return min(max(chance**0.7 + self.noise[position], 0.001), 0.999)


def _spread(mean: float, rng: random.Random) -> float:
    if mean in (0.0, 1.0):
        return mean
    return rng.betavariate(1.5 * mean, 1.5 * (1 - mean))


STATIONARY = {
    "code": [Passage(1000, 0.93)],
    "answers": [Passage(1000, 0.8)],
    "prose": [Passage(1000, 0.6)],
    "hard prose": [Passage(1000, 0.35)],
    "random words": [Passage(1000, 0.1)],
    "another language": [Passage(1000, 0.0)],
}
SWITCHING = {
    "code and prose": [Passage(250, 0.93), Passage(250, 0.3)],
    "prose, then code": [Passage(1000, 0.1), Passage(1000, 0.95)],
    "code, then prose": [Passage(1000, 0.95), Passage(1000, 0.1)],
    "short turns": [Passage(120, 0.95), Passage(120, 0.15)],
}


@dataclass
class Outcome:
    """True time of a run in plain steps per token, and what was done."""

    time: float
    tokens: int
    cycles: int = 0
    plain: int = 0
    verified: int = 0
    reads: int = 0

    @property
    def speed(self) -> float:
        """Tokens per plain step: above 1 is faster than plain decoding."""
        return self.tokens / self.time


def run(
    strategy: VerifyLength,
    machine: Machine,
    text: Text,
    block_size: int,
    noise: Callable[[], float] = lambda: 1.0,
    confidences: bool = True,
    prompt: int = 0,
) -> Outcome:
    """Generate a whole text behind a prompt; `noise` multiplies each time the strategy is shown."""
    out = Outcome(0.0, 0)
    before, waiting = "", 0
    while out.tokens < text.length:
        position = out.tokens
        most = min(block_size - 1, text.length - position - 1)
        context = prompt + position
        drafted = strategy.choose(most, context)
        assert 0 <= drafted <= most
        out.cycles += 1
        if drafted == 0:
            time = machine.verify(1, context) + (machine.drain if before == "draft" else 0.0)
            seconds = time * noise() if before else None
            cycle = Cycle(context, seconds=seconds, after_draft=before == "draft")
            before, out.tokens, out.plain = "plain", position + 1, out.plain + 1
            waiting += 1
        else:
            shown = [text.confidence(position + k, k) for k in range(drafted)]
            asked: list[bool] = []

            def read(shown: list[float] = shown, asked: list[bool] = asked) -> list[float]:
                asked.append(True)
                return shown

            m = strategy.narrow(read)
            assert 0 <= m <= drafted
            n = 0
            while n < m and text.accepts(position + n, n):
                n += 1
            time = machine.cycle(m, context, block_size) + machine.reading * bool(asked)
            time += machine.catch_up * waiting
            after_plain = before == "plain"
            both = time + after_plain * machine.verify(1, context)
            seconds = both * noise() if before else None
            confidence = shown if confidences else None
            cycle = Cycle(context, m, n, seconds, confidence, bool(asked), after_plain)
            before, waiting, out.tokens = "draft", 0, position + n + 1
            out.verified, out.reads = out.verified + m, out.reads + bool(asked)
        out.time += time
        strategy.observe(cycle)
    return out


def timing_noise(rng: random.Random) -> Callable[[], float]:
    """A tenth more or less, and now and then a cycle that something else interrupted."""

    def noise() -> float:
        factor = rng.lognormvariate(0, 0.1)
        return factor * rng.uniform(2, 8) if rng.random() < 0.02 else factor

    return noise
