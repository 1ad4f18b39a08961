"""What cycles cost on this machine: log-seconds, learned by a Kalman filter from the laps."""

from collections.abc import Mapping, Sequence
from math import exp, log, log2, sqrt

from dflash_mlx.policy.protocol import Cycle, Kind

GUESS = 0.2  # plain steps; a further row on a machine that nobody timed, and half of a draft
DOUBT = 0.35  # log; how far the guess may be off for the draft, and for every doubling of the rows
DETOUR = 0.1  # log; what reading, entry and exit add to a lap, and how far that may be off
SECOND_HAND = 0.15  # of DOUBT's variance; left by another process, or half the context
PACE_DRIFT = 0.05  # log a lap; a load that doubles all times is followed within ten laps or so
OWN_DRIFT = 0.005  # log a lap; what one length's cost may wander against the others'
FIRST_NOISE = 0.3  # log; how laps scatter, before they have shown it
LEAST_NOISE = 0.02  # log; no machine is steadier
BUSY = 0.2  # log; laps that scatter more, or are slower by more, are of a busy moment
SURPRISE = 2.0  # standard deviations; a lap further out is a spike, and counts as this far out
FIRST_REACH = 3  # proposals; the most where nothing longer was ever timed
LEAST_DRAFT = 0.05  # plain steps; no draft's forward costs less
NOTHING = 1e-6  # log, squared; a covariance that moves no estimate
SLOWLY = 0.05  # share by which noise, depths and what reading gains follow what is seen
OPTIMISM = 0.8  # standard deviations of its cost that what is unsure gets in advance
SHORT_REST, LONG_REST = 12.0, 200.0  # plain steps of rest for each that a look may lose, or lost
SIZES = (8, 12, 16, 24, 32, 48, 64)  # rows of trees, where no line has as many
# A state's parts that all lengths share: the pace, then what multiplies a lap. Lengths follow.
PACE, READ, TREE, ENTRY, EXIT, SHARED = range(6)


class Costs:
    """What cycles cost near one context length.

    The state: the *pace*, the log-seconds of a plain step, which all kinds of cycle share, so that
    a machine that slows down as a whole changes no ratio; for m = 0 … most proposals the log of a
    cycle's cost in plain steps, to which every doubling of the rows adds a part of its own, so that
    lengths learn from their neighbours; the logs of what reading the confidences, a tree's growth
    and mask, the entry into drafting and the exit from it multiply a lap by. A lap's log is the sum
    of its parts, and noise.

    Attributes:
        counts: numbers of proposals that have a cost; those beyond `most` are of trees alone.
    """

    plain_timed = False  # whether a plain lap was timed

    def __init__(self, most: int):
        """Nothing is known but how many proposals there may be."""
        self.most, self.frozen = most, False
        self.counts = list(range(most + 1))
        self.reach = 0  # the most proposals that a timed cycle verified
        self.timed = 0  # drafted laps
        self.last = 0  # proposals of the latest of them
        self.noise, self._laps = FIRST_NOISE, 0  # the first laps tell most about how they scatter
        self._paced = self._kept = self._first = False
        self._mean = [0.0, *[DETOUR] * (SHARED - 1), *map(_guess, self.counts)]
        self._var = [[0.0] * len(self._mean) for _ in self._mean]
        for i in range(READ, SHARED):
            self._var[i][i] = DETOUR**2
        self._doubt(1.0)

    def _doubt(self, share: float) -> None:
        for i, m in enumerate(self.counts, SHARED):
            for j, n in enumerate(self.counts, SHARED):
                self._var[i][j] += share * DOUBT**2 * (1 + log2(1 + min(m, n)))

    def widen(self) -> None:
        """Know of trees, too, which may have more nodes than a line has proposals.

        Their costs are thought to go on as those of long lines do, and what further doublings of
        the rows cost is as uncertain as ever.
        """
        last = self.most
        if self.counts[-1] > last:
            return
        longest, half = self.steps()[last], self.steps()[last // 2]
        row_cost = max(longest - half, 0.0) / (last - last // 2)
        for n in (rows - 1 for rows in SIZES if rows > self.most + 1):
            self._mean.append(log(longest + row_cost * (n - self.most)))
            row = list(self._var[-1])
            more = 0.0 if self.frozen else DOUBT**2 * log2((1 + n) / (1 + last))
            for known, v in zip(self._var, row, strict=True):
                known.append(v)
            self._var.append([*row, row[-1] + more])
            self.counts.append(n)
            last = n

    @classmethod
    def known(
        cls, plain: float, cycle: Sequence[float], reading: float, *, frozen: bool = False
    ) -> "Costs":
        """Start from costs in seconds, which are given up if the first drafted lap refutes them.

        Args:
            plain: a plain step.
            cycle: cycles of m = 0, 1, … proposals.
            reading: what reading the confidences adds to one.
            frozen: believe them whatever laps say; decisions then depend on the text alone.
        """
        costs = cls(len(cycle) - 1)
        costs._mean[PACE], costs._mean[SHARED:] = log(plain), [log(c / plain) for c in cycle]
        costs._mean[READ] = log(1 + reading / cycle[len(cycle) // 2])
        costs._kept, costs.frozen, costs.reach = True, frozen, costs.most
        costs.plain_timed = frozen
        share = 0.0 if frozen else SECOND_HAND
        costs._var = [[share * v for v in row] for row in costs._var]
        return costs

    def near(self, doublings: int) -> "Costs":
        """What to start from at a context so many doublings longer or shorter."""
        if self.frozen:
            return self
        costs = Costs(self.most)
        costs.counts = list(self.counts)
        costs._mean, costs._var = list(self._mean), [list(row) for row in self._var]
        costs.noise, costs._laps, costs.plain_timed = self.noise, self._laps, self.plain_timed
        costs._doubt(SECOND_HAND * doublings)
        return costs

    def observe(self, cycle: Cycle) -> None:
        """Learn from the time of one cycle."""
        seconds, kind = cycle.lap
        if cycle.tree:
            self.widen()  # it was grown by what another context's length knows
        if self.frozen or kind is Kind.VOID or seconds <= 0:
            return
        parts, m, drafted = {PACE: 1.0}, cycle.verified, cycle.drafted > 0
        self.reach = max(self.reach, m)
        if drafted:
            self.last, self.timed = m, self.timed + 1
            parts[self._part(m)] = 1.0
            if cycle.tree or cycle.read:
                parts[TREE if cycle.tree else READ] = 1.0
        if kind is Kind.ENTRY:
            # How much of the plain step is in it depends on how far ahead the device queues.
            seconds = max(seconds - self.plain, seconds / 2)
        self.plain_timed |= kind in (Kind.PLAIN, Kind.EXIT)
        if kind in (Kind.ENTRY, Kind.EXIT):
            parts[ENTRY if drafted else EXIT] = 1.0
        seen = log(seconds)
        if kind is Kind.COPIED:
            if not self._paced:
                return
            # Near what is believed its log is linear in those of C(m) and C(0), too.
            steps, taken = self.steps(), self.copied()[m]
            slopes = {self._part(m): steps[m] / taken, SHARED: -steps[0] / taken}
            seen -= log(taken) - sum(w * self._mean[i] for i, w in slopes.items())
            parts, drafted = parts | slopes, self._first
        self._update(parts, seen, drafted)

    def _update(self, parts: Mapping[int, float], seen: float, drafted: bool) -> None:
        mean, var = self._mean, self._var
        if not self._paced:
            # The first lap says how fast the machine is, and nothing else.
            mean[PACE], var[PACE][PACE] = seen - sum(mean[i] for i in parts if i != PACE), 100.0
        var[PACE][PACE] += PACE_DRIFT**2
        for i in range(SHARED, len(mean)):
            var[i][i] += OWN_DRIFT**2
        column = [sum(w * row[i] for i, w in parts.items()) for row in var]
        spread = sqrt(sum(w * column[i] for i, w in parts.items()) + self.noise**2)
        z = (seen - sum(w * mean[i] for i, w in parts.items())) / spread
        if self._kept and self._paced and drafted != self._first:
            self._kept = False
            if abs(z) > SURPRISE:
                new = Costs(self.most)
                if len(self.counts) > len(new.counts):
                    new.widen()
                mean[PACE + 1 :], self._var = new._mean[PACE + 1 :], new._var
                # What paced the machine says so without kept costs only of plain steps.
                self._var[PACE][PACE], self._paced = self.noise**2, drafted
                return self._update(parts, seen, drafted)
        if not self._paced:
            self._first = drafted
        self._paced = True
        # The noise at which a third of all laps lies further out than one standard deviation.
        self._laps += 1
        pull = max(SLOWLY, 1 / self._laps)
        self.noise = max(self.noise * exp(pull * ((abs(z) > 1) - 0.32)), LEAST_NOISE)
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

    def _part(self, m: int) -> int:
        return SHARED + (m if m <= self.most else self.counts.index(m))

    def steps(self) -> list[float]:
        """Plain steps of a cycle of m = 0 … most proposals; a plain step is always a part of it."""
        least = log(1 + LEAST_DRAFT)
        return [exp(max(x, least)) for x in self._mean[SHARED : SHARED + self.most + 1]]

    def trees(self) -> list[float]:
        """Plain steps of a tree's cycle, for all of `counts`."""
        least, more = log(1 + LEAST_DRAFT), max(self._mean[TREE], 0.0)
        return [exp(max(x, least) + more) for x in self._mean[SHARED:]]

    def tree(self, nodes: int) -> float:
        """Plain steps of a tree's cycle with one of `counts`."""
        return self.trees()[self._part(nodes) - SHARED]

    def copied(self) -> list[float]:
        """Plain steps of a verify of m = 0 … most proposals that needed no draft's forward."""
        draft, *_ = steps = self.steps()
        return [max(s - draft, 0.0) + 1 for s in steps]

    def within(self, most: int) -> int:
        """How many proposals may be verified, of `most`: lengths are reached by doublings."""
        return min(max(2 * self.reach + 1, FIRST_REACH), most)

    def doubt(self, m: int, n: int | None = None) -> float:
        """Standard deviation of the log of a cycle's cost, against a plain step or a length n."""
        v, i = self._var, self._part(m)
        if n is None:
            return sqrt(max(v[i][i], 0.0))
        j = self._part(n)
        return sqrt(max(v[i][i] + v[j][j] - 2 * v[i][j], 0.0))

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
