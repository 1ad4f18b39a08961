"""Machines by what their cycles cost, texts by what a draft would guess right, and noise."""

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH = 4  # candidates of a position


@dataclass(frozen=True, eq=False)
class Machine:
    """Costs in plain steps at a short context.

    Attributes:
        rows: a verify by its rows; between those given it lies on straight lines.
        draft: a draft's forward.
        per_row: what 1,000 tokens of context add to every row of a forward, the draft's included.
    """

    name: str
    rows: dict[int, float]
    draft: float
    per_row: float = 0.0

    def verify(self, rows: int, context: int) -> float:
        known = sorted(self.rows)
        right = min(max(bisect_left(known, rows), 1), len(known) - 1)
        a, b = known[right - 1], known[right]
        curve = self.rows[a] + (self.rows[b] - self.rows[a]) * (rows - a) / (b - a)
        return curve + rows * self.per_row * context / 1000

    def propose(self, block: int, context: int) -> float:
        return self.draft * (1 + block * self.per_row * context / 1000)


def scaled(milliseconds: dict[int, float]) -> dict[int, float]:
    return {rows: ms / milliseconds[1] for rows, ms in milliseconds.items()}


# From the M5 Max on others' measurements, or between the bounds that they gave.
MACHINES = {
    m.name: m
    for m in (
        Machine("flat", {1: 1.0, 16: 1.0}, 0.15),
        Machine("gentle slope", {1: 1.0, 16: 1.9}, 0.2),
        Machine("cliff at 5 rows", {1: 1.0, 4: 1.1, 5: 1.9, 8: 2.2, 16: 3.2}, 0.12),
        Machine("cliff at 9 rows", {1: 1.0, 8: 1.25, 9: 2.4, 16: 3.0}, 0.15),
        Machine("hopeless", {1: 1.0, 16: 12.0}, 1.0),
        Machine("M5 Max 4-bit", scaled({1: 76, 3: 85, 5: 108, 8: 168, 12: 242, 16: 296}), 0.08),
        Machine("M4 Pro 4-bit", {1: 1.0, 2: 1.14, 3: 1.36, 4: 1.4, 6: 1.8, 8: 2.2, 16: 4.4}, 0.15),
        Machine("M3 Ultra 4-bit", {1: 1.0, 2: 1.8, 4: 3.3, 8: 6.1, 16: 6.3}, 0.12),
        Machine("M3 Ultra bf16", {1: 1.0, 2: 2.0, 16: 2.0}, 0.12),
        Machine("mixture of experts", {1: 1.0, 2: 1.5, 4: 2.2, 8: 3.2, 16: 4.6}, 0.2),
        Machine("2-core CPU", scaled({1: 7.8, 4: 10.5, 8: 13.2, 16: 20.0}), 0.33),
        Machine("growing with context", {1: 1.0, 16: 1.9}, 0.2, per_row=0.02),
    )
}


class Text:
    """Which tokens a draft would guess, fixed for a seed, whatever is drafted and verified.

    Each token has a chance of its own around its passage's, and a draw that decides. Deeper
    proposals are a little worse. The confidence is a distorted, noisy view of the chance. Where the
    first guess is wrong, the second has half its chance, the third a quarter.
    """

    def __init__(self, passages: Sequence[tuple[int, float]], length: int, seed: object):
        rng = random.Random(f"text {passages} {seed}")
        self.length = length
        self.chances: list[float] = []
        while len(self.chances) < length + 32:
            for tokens, mean in passages:
                certain = mean in (0.0, 1.0)
                self.chances += [
                    mean if certain else rng.betavariate(1.5 * mean, 1.5 * (1 - mean))
                    for _ in range(tokens)
                ]
        self.draws = [rng.random() for _ in self.chances]
        self.blur = [rng.gauss(0, 0.1) for _ in self.chances]

    def right(self, position: int, depth: int) -> bool:
        return self.draws[position] < self.chances[position] * 0.985**depth

    def rank(self, position: int, depth: int) -> int:
        """Which of the draft's candidates is right; WIDTH if none is."""
        first = self.chances[position] * 0.985**depth
        if self.draws[position] < first:
            return 0
        left = (self.draws[position] - first) / (1 - first)
        return next((r for r in range(1, WIDTH) if left < first * (1 - 0.5**r)), WIDTH)

    def confidence(self, position: int, depth: int) -> float:
        chance = self.chances[position] * 0.985**depth
        return min(max(chance**0.7 + self.blur[position], 0.001), 0.999)


TEXTS = {
    "good": [(1000, 0.93)],
    "fair": [(1000, 0.6)],
    "poor": [(1000, 0.35)],
    "hopeless": [(1000, 0.0)],
    "switching": [(250, 0.93), (250, 0.3)],
    "short turns": [(120, 0.95), (120, 0.15)],
}


@dataclass(frozen=True)
class Noise:
    """What is wrong with the times that a policy is shown.

    Attributes:
        spread: of the log of every time.
        spikes: the share of cycles that take 2 to 5 times as long.
        load: how much slower everything is, by the seconds shown so far.
    """

    spread: float = 0.02
    spikes: float = 0.0
    load: Callable[[float], float] = lambda seconds: 1.0


NOISES = {
    "quiet": Noise(),
    "noise of 10 %": Noise(0.1),
    "noise of 30 %": Noise(0.3),
    "spikes": Noise(0.05, 0.05),
    "load that comes and goes": Noise(0.1, load=lambda t: 1.0 + int(t / 10) % 2),
    "load at the start": Noise(0.05, load=lambda t: 2.5 if t < 8 else 1.0),
}
