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


class CostModel:
    """Costs by context length, from medians of recent cycles over a measured or guessed seed.

    Context lengths are taken in doublings: 512, 1024, 2048 … A length that was never reached starts
    from what its nearest neighbour knows.
    """

    def __init__(self, seed: Costs):
        self._seed = seed
        self._levels: dict[int, _Level] = {}

    def at(self, context: int) -> Costs:
        """The costs with `context` tokens in the target's cache."""
        return self._level(context).costs

    def knows_plain(self, context: int) -> bool:
        """Whether plain cycles were timed near this context length."""
        return self._level(context).plain.known

    def tries(self, context: int) -> Counter[int]:
        """How many cycles the estimates here come from, by proposals."""
        return self._level(context).tries

    def observe(self, context: int, proposals: int | None, seconds: float, read: bool) -> None:
        """Learn from one cycle; `proposals` is None for a plain one."""
        self._level(context).observe(proposals, seconds, read)

    def _level(self, context: int) -> "_Level":
        key = (context >> 9).bit_length()
        if key not in self._levels:
            near = min(self._levels, key=lambda k: abs(k - key), default=None)
            if near is None:
                self._levels[key] = _Level(self._seed, {})
            else:
                self._levels[key] = _Level(self._levels[near].costs, self._levels[near].tries)
        return self._levels[key]


class _Samples:
    """The latest timings of one kind of cycle."""

    def __init__(self, prior: int = 5):
        self._recent: deque[float] = deque(maxlen=31)
        self._prior = prior  # timings that an expectation is worth
        self._middle = 0.0

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        # Noise only ever adds time, so one or two samples count by the smaller.
        few = len(self._recent) < 3
        self._middle = min(self._recent) if few else median(self._recent)

    @property
    def known(self) -> bool:
        return len(self) >= 3

    def __len__(self) -> int:
        return len(self._recent)

    def against(self, expected: float) -> float:
        """The estimate, given what was expected before any timing."""
        n = len(self._recent)
        # One slow sample says more about the moment than about the cycle.
        if n == 0 or (n == 1 and self._middle > 1.5 * expected):
            return expected
        return (n * self._middle + self._prior * expected) / (n + self._prior)

    def ratio(self, seed: float) -> float:
        return self.against(seed) / seed


class _Level:
    """Costs near one context length."""

    def __init__(self, seed: Costs, tries: Mapping[int, int]):
        self.seed = seed
        self.tries = Counter(tries)
        self.plain = _Samples(prior=1)
        self.cycle: dict[int, _Samples] = {}
        self.reading = _Samples()
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
            self.tries[proposals] += 1
            samples = self.cycle.setdefault(proposals, _Samples())
            if not read:
                samples.add(seconds)
            elif samples.known:
                self.reading.add(max(seconds - self.costs.cycle[proposals], 0.0))
            else:
                samples.add(max(seconds - self.costs.reading, 0.0))
        self._costs = None

    def _estimate(self) -> Costs:
        seed = self.seed
        ratios = {m: s.ratio(seed.cycle[m]) for m, s in self.cycle.items()}
        plain_ratio = self.plain.ratio(seed.plain)
        drafting = _middle(ratios.values(), plain_ratio)
        plain = self.plain.against(seed.plain * drafting)
        cycle = []
        for m, before in enumerate(seed.cycle):
            # A length never tried here moves with the nearest one that was.
            near = min(ratios, key=lambda known: (abs(known - m), -known), default=None)
            expected = before * (plain_ratio if near is None else ratios[near])
            cycle.append(self.cycle[m].against(expected) if m in self.cycle else expected)
        return Costs(plain, tuple(cycle), self.reading.against(seed.reading))


def _middle(values: Iterable[float], default: float) -> float:
    known = list(values)
    return median(known) if known else default
