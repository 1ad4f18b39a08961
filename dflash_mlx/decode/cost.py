"""What cycles cost on this machine, now: learned from the cycles themselves."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Costs:
    """Seconds per cycle, host work included.

    Attributes:
        plain: one token without a draft, the next forward queued before it is read.
        cycle: entry m is a draft forward and a verify of m proposals, m = 0 … block_size - 1.
        reading: what a cycle takes longer when the host reads the draft's confidences before it
            queues the verify.
    """

    plain: float
    cycle: tuple[float, ...]
    reading: float

    @classmethod
    def guess(cls, block_size: int) -> "Costs":
        """A careful shape, in forwards of the target, for a machine that nobody has measured."""
        return cls(1.0, tuple(1.25 + 0.15 * m for m in range(block_size)), 0.1)

    def smoothed(self) -> "Costs":
        """The nearest costs that never fall from one length to the next.

        A verify of more rows is hardly ever cheaper. What looks so in few timings is noise, and the
        luckiest length would be believed.
        """
        pools: list[tuple[float, int]] = []
        for value in self.cycle:
            count = 1
            while pools and pools[-1][0] > value:
                before, more = pools.pop()
                value = (before * more + value * count) / (more + count)
                count += more
            pools.append((value, count))
        cycle = tuple(value for value, count in pools for _ in range(count))
        return Costs(self.plain, cycle, self.reading)


class CostModel:
    """Costs by context length, from medians of recent cycles over what was known before.

    Context lengths are taken in doublings: 512, 1024, 2048 … A length that was never reached starts
    from what its nearest neighbour knows.
    """

    def __init__(self, seed: Costs, longer: Mapping[int, Costs] | None = None):
        """Start from a seed for short contexts, and from costs of levels 1, 2, … if known."""
        known = {0: seed, **(longer or {})}
        self._levels = {level: _Level(costs, {}) for level, costs in known.items()}
        self._known = set(known)

    def at(self, context: int) -> Costs:
        """The costs with `context` tokens in the target's cache."""
        return self._level(context).costs

    def knows(self, context: int) -> bool:
        """Whether any cycle was ever timed near this context length."""
        return _level_of(context) in self._known or self._level(context).plain.known

    def knows_plain(self, context: int) -> bool:
        """Whether plain cycles were timed near this context length, and agree."""
        return self._level(context).plain.steady

    def tries(self, context: int) -> Counter[int]:
        """How many cycles the estimates here come from, by proposals."""
        return self._level(context).tries

    def observe(
        self,
        context: int,
        proposals: int | None,
        seconds: float,
        read: bool = False,
        after_plain: bool = False,
    ) -> None:
        """Learn from one cycle.

        Args:
            context: tokens in the target's cache when it began.
            proposals: how many it verified; None for a plain one.
            seconds: its time.
            read: whether the confidences were read before the verify was queued.
            after_plain: whether the time is also that of the plain cycle before it.
        """
        level = self._level(context)
        if after_plain and proposals is not None:
            level.check(proposals, seconds)
        else:
            level.observe(proposals, seconds, read)

    def learned(self) -> dict[int, Costs]:
        """The costs of every level of which something is known, the short contexts' being 0."""
        return {
            key: level.costs
            for key, level in self._levels.items()
            if key in self._known or (level.plain.known and level.cycle)
        }

    def save(self) -> None:
        """Keep what was learned for other processes; this one has nowhere to keep it."""

    def _level(self, context: int) -> "_Level":
        key = _level_of(context)
        if key not in self._levels:
            near = min(self._levels, key=lambda k: abs(k - key))
            known = self._levels[near]
            self._levels[key] = _Level(known.costs, known.tries, grown=key > near)
        return self._levels[key]


def _level_of(context: int) -> int:
    return (context >> 9).bit_length()


class _Samples:
    """The latest timings of one kind of cycle."""

    prior = 5  # timings that an expectation is worth

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=31)

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)

    @property
    def middle(self) -> float:
        # Noise only ever adds time, so one or two samples count by the smaller.
        return median(self._recent) if len(self._recent) > 2 else min(self._recent)

    @property
    def known(self) -> bool:
        return len(self) >= 3

    def __len__(self) -> int:
        return len(self._recent)

    def against(self, expected: float) -> float:
        """The estimate, given what was expected before any timing."""
        n = len(self)
        if n == 0:
            return expected
        middle = self.middle
        # One slow sample says more about the moment than about the cycle.
        if n == 1 and middle > 1.5 * expected:
            return expected
        return (n * middle + self.prior * expected) / (n + self.prior)

    def ratio(self, seed: float) -> float:
        return self.against(seed) / seed


class _PlainSamples(_Samples):
    """Timings of plain cycles, which come in runs: a short one now and then while drafting wins.

    Something else may slow a whole run down, and while drafting wins nothing soon shows that it is
    over. So a run that was far faster than the usual counts: thought too fast, plain decoding is
    soon taken up and timed at length, and a long run speaks for itself.
    """

    prior = 1
    long, far = 12, 0.75

    def __init__(self) -> None:
        super().__init__()
        self._runs: deque[_Samples] = deque(maxlen=3)
        self._ended = True

    def end_run(self) -> None:
        """The next timing belongs to another run."""
        self._ended = True

    def add(self, seconds: float) -> None:
        super().add(seconds)
        if self._ended:
            self._runs.append(_Samples())
            self._ended = False
        self._runs[-1].add(seconds)

    @property
    def middle(self) -> float:
        usual, run = super().middle, self._runs[-1]
        if len(run) >= self.long:
            return run.middle
        fastest = min((r.middle for r in self._runs if r.known), default=usual)
        return fastest if fastest < self.far * usual else usual

    @property
    def steady(self) -> bool:
        """Whether several runs were timed, and none of the latest was far from the others."""
        middles = [run.middle for run in self._runs if run.known]
        return len(self) >= 9 and min(middles, default=0.0) > self.far * max(middles, default=0.0)


class _Level:
    """Costs near one context length; `grown` where the seed is from a shorter one."""

    def __init__(self, seed: Costs, tries: Mapping[int, int], grown: bool = False):
        self.seed, self.grown = seed, grown
        self.tries = Counter(tries)
        self.plain = _PlainSamples()
        self.cycle: dict[int, _Samples] = {}
        self.reading = _Samples()
        self._checks: deque[tuple[float, float]] = deque(maxlen=3)
        # For every length the nearest one that was timed, and how many those were.
        self._nearest: list[int] = []
        self._timed = 0
        self._costs: Costs | None = seed

    @property
    def costs(self) -> Costs:
        if self._costs is None:
            self._costs = self._estimate()
        return self._costs

    def observe(self, proposals: int | None, seconds: float, read: bool) -> None:
        if proposals is None:
            self.plain.add(seconds)
        else:
            self.plain.end_run()
            self.tries[proposals] += 1
            samples = self.cycle.setdefault(proposals, _Samples())
            if not read:
                samples.add(seconds)
            elif samples.known:
                self.reading.add(max(seconds - self.costs.cycle[proposals], 0.0))
            else:
                samples.add(max(seconds - self.costs.reading, 0.0))
        self._costs = None

    def check(self, proposals: int, seconds: float) -> None:
        """Learn from a cycle timed together with a plain one, as all lone ones are.

        How much of the plain one's time is in it depends on how far ahead the device queues. So
        these are bounds, which show only when all estimates are far too high or too low.
        """
        self.plain.end_run()
        self.tries[proposals] += 1
        now = self.costs
        self._checks.append((seconds / now.cycle[proposals], now.plain / now.cycle[proposals]))
        if len(self._checks) < 3:
            return
        most = median(most for most, _ in self._checks)
        least = median(most - plain for most, plain in self._checks)
        # A draft that catches up takes longer too, so that alone proves nothing.
        longer = self.grown and now.plain > 1.2 * self.seed.plain
        if most < 0.7 or (least > 1.4 and longer):
            factor = most if most < 0.7 else least
            self.seed = Costs(now.plain, tuple(cost * factor for cost in now.cycle), now.reading)
            self.grown, self._costs = False, None
            self.cycle.clear()
            self._nearest.clear()
            self._checks.clear()

    def _estimate(self) -> Costs:
        seed, plain_ratio = self.seed, self.plain.ratio(self.seed.plain)
        expected, unknown = seed.cycle, plain_ratio
        if self.grown:
            # What a longer context adds to a plain step it may add to every row of a verify;
            # a tenth may as well be noise.
            row = max(self.plain.against(seed.plain) - 1.1 * seed.plain, 0.0)
            expected = tuple(cost + (m + 1) * row for m, cost in enumerate(seed.cycle))
            unknown = 1.0
        ratios = {m: s.ratio(expected[m]) for m, s in self.cycle.items()}
        plain = self.plain.against(seed.plain * _middle(ratios.values(), plain_ratio))
        if len(self._nearest) != len(expected) or len(ratios) != self._timed:
            self._timed, known = len(ratios), sorted(ratios, reverse=True)
            self._nearest = [
                min(known, key=lambda k: abs(k - m), default=m) for m in range(len(expected))
            ]
        # A length never tried here moves with the nearest one that was.
        cycle = [
            cost * ratios.get(near, unknown)
            for cost, near in zip(expected, self._nearest, strict=True)
        ]
        for m, samples in self.cycle.items():
            cycle[m] = samples.against(cycle[m])
        return Costs(plain, tuple(cycle), self.reading.against(seed.reading))


def _middle(values: Iterable[float], default: float) -> float:
    known = list(values)
    return median(known) if known else default
