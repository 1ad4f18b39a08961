"""What cycles cost on this machine: log-seconds, learned by a Kalman filter from the laps."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import exp, log, log2, sqrt

from dflash_mlx.policy.protocol import Cycle, Kind

GUESS = 0.2  # plain steps; a further row on a machine that nobody timed, and half of a draft
DOUBT = 0.35  # log; how far the guess may be off for the draft, and for every doubling of the rows
DETOUR = 0.1  # log; what reading, trees, entry and exit add to a lap, and how far that may be off
SECOND_HAND = 0.15  # share of all doubt in kept costs, and of the hope that shorter contexts give
PACE_DRIFT = 0.1  # log a lap; a load that doubles all times is followed within five laps or so
OWN_DRIFT = 0.005  # log a lap; what one length's cost may wander against the others'
FIRST_NOISE = 0.2  # log; how laps scatter, before they have shown it
BUSY = 0.2  # log; laps that scatter more, or are slower by more, are of a busy moment
SURPRISE = 2.0  # standard deviations; a lap further out is a spike, and counts as this far out
LEAST_DRAFT = 0.05  # plain steps; no draft's forward costs less
NOTHING = 1e-6  # log, squared; a covariance that moves no estimate
SLOWLY = 0.05  # share by which noise, depths and what reading gains follow what is seen
OPTIMISM = 0.8  # standard deviations of its cost that what is unsure gets in advance
SIZES = (7, 11, 15, 23, 31, 47, 63)  # nodes of trees, where no line has as many proposals
# A state's parts that all lengths share: the pace, then what multiplies a lap. Lengths follow.
PACE, READ, TREE, ENTRY, EXIT, SHARED = range(6)


class Costs:
    """What cycles cost near one context length.

    The state: the *pace*, the log-seconds of a plain step, which all kinds of cycle share, so that
    a machine that slows down as a whole changes no ratio; the logs of what reading the confidences,
    a tree's growth and mask, the entry into drafting and the exit from it multiply a lap by; for
    m = 0 … most proposals the log of a cycle's cost in plain steps, to which every doubling of the
    rows adds a part of its own, so that lengths learn from their neighbours. A lap's log is the sum
    of its parts, and noise.

    Attributes:
        counts: numbers of proposals that have a cost; those beyond `most` are of trees alone.
        frozen: whether they are believed whatever laps say.
        drafts, last: drafted laps, and the proposals of the latest.
    """

    def __init__(self, most: int):
        """Nothing is known but how many proposals there may be."""
        self.most, self.frozen, self._plain_timed = most, False, False
        self.drafts = self.last = 0
        self.noise, self._laps = FIRST_NOISE, 0  # the first laps tell most about how they scatter
        self._kept = False  # whether these costs are of another process, and not yet refuted
        self.counts = [*range(most + 1), *(n for n in SIZES if n > most)]
        self._mean = [0.0, *[DETOUR] * (SHARED - 1), *map(_guess, self.counts)]
        self._var = [[0.0] * len(self._mean) for _ in self._mean]
        self._var[PACE][PACE] = 100.0**2  # the first lap tells it
        for i in range(READ, SHARED):
            self._var[i][i] = DETOUR**2
        for i, m in enumerate(self.counts, SHARED):
            for j, n in enumerate(self.counts, SHARED):
                self._var[i][j] = DOUBT**2 * (1 + log2(1 + min(m, n)))

    @classmethod
    def known(
        cls, plain: float, cycle: Sequence[float], reading: float, *, frozen: bool = False
    ) -> "Costs":
        """Start from costs in seconds, which are given up if the first laps refute them.

        Args:
            plain: a plain step.
            cycle: cycles of m = 0, 1, … proposals.
            reading: what reading the confidences adds to one.
            frozen: believe them whatever laps say; decisions then depend on the text alone.
        """
        costs = cls(len(cycle) - 1)
        lengths = [log(c / plain) for c in cycle]
        beyond = [_guess(n) - _guess(costs.most) + lengths[-1] for n in costs.counts[len(cycle) :]]
        costs._mean[PACE], costs._mean[SHARED:] = log(plain), lengths + beyond
        costs._mean[READ] = log(1 + reading / cycle[len(cycle) // 2])
        costs._kept, costs.frozen = True, frozen
        costs._plain_timed = frozen
        share = 0.0 if frozen else SECOND_HAND
        costs._var = [[share * v for v in row] for row in costs._var]
        return costs

    def elsewhere(self) -> "Costs":
        """What to start from behind a context of another length."""
        if self.frozen:
            return self
        costs, doubts = deepcopy(self), Costs(self.most)._var
        costs.drafts, costs._kept, doubts[PACE][PACE] = 0, False, 0.0
        pairs = (zip(*rows, strict=True) for rows in zip(self._var, doubts, strict=True))
        costs._var = [[v + SECOND_HAND * doubt for v, doubt in row] for row in pairs]
        return costs

    def observe(self, cycle: Cycle) -> None:
        """Learn from the time of one cycle."""
        seconds, kind = cycle.lap
        if self.frozen or kind is Kind.VOID or seconds <= 0:
            return
        m, drafted, copied = cycle.verified, cycle.drafted > 0, kind is Kind.COPIED
        parts = {PACE: 1.0} | ({self._part(m): 1.0} if drafted or copied else {})
        if copied:
            if not self._laps:
                return
            # As if a draft's forward had been in it.
            seconds += (self.steps()[0] - 1) * self.plain
        if kind is Kind.ENTRY:
            # How much of the plain step is in it depends on how far ahead the device queues.
            seconds = max(seconds - self.plain, seconds / 2)
        if kind in (Kind.ENTRY, Kind.EXIT):
            parts[ENTRY if drafted else EXIT] = 1.0
        if cycle.tree or cycle.read:
            parts[TREE if cycle.tree else READ] = 1.0
        self._update(parts, log(seconds))
        self._plain_timed |= kind in (Kind.PLAIN, Kind.EXIT)
        if drafted:
            self.last, self.drafts = m, self.drafts + 1
        self._kept = self._kept and not (self.drafts and self._plain_timed)

    def _update(self, parts: Mapping[int, float], seen: float) -> None:
        mean, var = self._mean, self._var
        var[PACE][PACE] += PACE_DRIFT**2
        for i in range(SHARED, len(mean)):
            var[i][i] += OWN_DRIFT**2
        column = [sum(w * row[i] for i, w in parts.items()) for row in var]
        spread = sqrt(sum(w * column[i] for i, w in parts.items()) + self.noise**2)
        z = (seen - sum(w * mean[i] for i, w in parts.items())) / spread
        if self._kept and abs(z) > SURPRISE:
            vars(self).update(vars(Costs(self.most)))
            return self._update(parts, seen)
        # The noise at which a third of all laps lies further out than one standard deviation.
        self._laps += 1
        pull = max(SLOWLY, 1 / self._laps)
        self.noise *= exp(pull * ((abs(z) > 1) - 0.32))
        z = min(max(z, -SURPRISE), SURPRISE)
        for i, c in enumerate(column):
            # Plain laps in a row tell less and less of anything but the pace.
            if abs(c) > NOTHING:
                mean[i] += z / spread * c
                share = c / spread**2
                var[i] = [v - share * b for v, b in zip(var[i], column, strict=True)]

    @property
    def plain(self) -> float:
        """Seconds of a plain step."""
        return exp(self._mean[PACE])

    def _part(self, count: int) -> int:
        return SHARED + (count if count <= self.most else self.counts.index(count))

    def steps(self) -> list[float]:
        """Plain steps of a cycle of m = 0 … most proposals; a plain step is always a part of it."""
        least = log(1 + LEAST_DRAFT)
        return [exp(max(x, least)) for x in self._mean[SHARED : SHARED + self.most + 1]]

    def trees(self) -> list[float]:
        """Plain steps of a tree's cycle, for all of `counts`."""
        least, more = log(1 + LEAST_DRAFT), max(self._mean[TREE], 0.0)
        return [exp(max(x, least) + more) for x in self._mean[SHARED:]]

    def copied(self) -> list[float]:
        """Plain steps of a verify of m = 0 … most proposals that needed no draft's forward."""
        draft, *_ = steps = self.steps()
        return [max(s - draft, 0.0) + 1 for s in steps]

    def taken(self, cycle: Cycle) -> float:
        """Plain steps that such a cycle takes."""
        m = cycle.verified
        if cycle.copied:
            return self.copied()[m]
        if cycle.tree:
            return self.trees()[self._part(m) - SHARED]
        if not cycle.drafted:
            return 1.0
        entry = self.detour if cycle.lap.kind is Kind.ENTRY else 0.0
        return self.steps()[m] * (1 + self.reading * cycle.read) + entry

    def doubt(self, m: int, n: int | None = None) -> float:
        """Standard deviation of the log of a cycle's cost, against a plain step or a length n."""
        v, i = self._var, self._part(m)
        if n is None:
            return sqrt(max(v[i][i], 0.0))
        j = self._part(n)
        return sqrt(max(v[i][i] + v[j][j] - 2 * v[i][j], 0.0))

    @property
    def guessed(self) -> bool:
        """Whether nobody ever timed a drafted cycle."""
        return not (self.drafts or self._kept)

    @property
    def reading(self) -> float:
        """Share that reading the confidences adds to a cycle."""
        return exp(max(self._mean[READ], 0.0)) - 1

    @property
    def detour(self) -> float:
        """Plain steps that going over to drafting and back adds to the cycles themselves."""
        return sum(exp(max(self._mean[i], 0.0)) - 1 for i in (ENTRY, EXIT))

    def seconds(self) -> tuple[float, tuple[float, ...], float]:
        """What `known` takes."""
        cycle = tuple(self.plain * s for s in self.steps())
        return self.plain, cycle, self.reading * cycle[len(cycle) // 2]

    @property
    def settled(self) -> bool:
        """Whether they are worth keeping: both kinds of cycle were timed, at a quiet moment."""
        surest = min(map(self.doubt, range(self.most + 1)))
        return not self.frozen and self.noise < BUSY and surest < DOUBT / 2


def _guess(m: int) -> float:
    """The log of what a cycle of m proposals is thought to cost in plain steps."""
    return log(1 + GUESS * (1 + m / 2))
