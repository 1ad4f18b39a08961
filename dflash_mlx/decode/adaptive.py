"""The verify length that pays, decided every cycle from measured cost and expected acceptance.

A cycle of cost C(m) that yields E(m) tokens runs at E(m) / C(m); plain decoding runs at 1 / plain.
Drafting is chosen when its best rate is higher. Reading the confidences of the block just drafted
allows a choice for this very block: with a rate r to be had otherwise, the best m is the one with
the largest E(m) - r C(m), and reading is worth the mean of that maximum, less r times its own cost.

While plain decoding wins, a look is taken now and then: a block is drafted and its confidences are
read, and it is verified only as far as they promise to beat plain decoding. A look is worth the
time that drafting would save if the text turned out to be good, times the chance of that.
"""

from collections.abc import Callable, Sequence
from math import sqrt

from dflash_mlx.decode.allowance import Allowance
from dflash_mlx.decode.cost import CostModel, Costs
from dflash_mlx.decode.excursion import Excursions
from dflash_mlx.decode.pace import Pace
from dflash_mlx.decode.reading import Reading
from dflash_mlx.decode.schedule import Cycle
from dflash_mlx.decode.value import Calibration, TextFilter, expected_tokens


class Learned:
    """What outlives a generation.

    Attributes:
        costs: of cycles on this machine.
        calibration: what the draft's confidence means.
        text: how well the draft guesses.
        allowance: what drafting may lose.
        excursions: what going from plain decoding to drafting and back costs.
        pace: of drafted cycles, against when plain decoding was last timed.
        drafted: cycles with a draft forward so far.
        since_plain: time since plain decoding was last timed, in plain steps.
    """

    def __init__(self, costs: CostModel, positions: int):
        self.costs = costs
        self.calibration = Calibration()
        self.text = TextFilter(positions)
        self.allowance = Allowance()
        self.excursions = Excursions()
        self.pace = Pace()
        self.drafted = 0
        self.since_plain = 0.0


class AdaptiveLength:
    """Chooses between a plain cycle and every verify length; learns over one generation."""

    learns = True
    horizon = 26  # tokens over which a look's finding is counted on
    least_loss = 0.4  # plain steps that a look is never thought to cost less than
    checks = 3  # looks that are taken even where costs from elsewhere say that no text can pay
    longest_rest = 1024  # plain tokens without a look
    eager_share = 0.1  # of the time, for looks at a text that may well be good
    plain_run = 5  # plain cycles timed together
    plain_share = 0.01  # what timing them may cost while drafting wins
    plain_interval = 32  # plain steps between two timings at least

    def __init__(self, learned: Learned):
        self.learned = learned
        self.costs, self.calibration, self.text = learned.costs, learned.calibration, learned.text
        self.allowance, self.excursions = learned.allowance, learned.excursions
        self.text.begin()
        self._reading = Reading(self.calibration)
        self._now: Costs = self.costs.at(0)
        self._count = 0
        # The rate that reading this block's confidences has to beat; None where they are not read.
        self._rate: float | None = None
        self._rest = 0  # plain tokens until the next look
        self._unseen = 0
        self._cycles = 0
        # Drafting wins: for how many cycles, and plain cycles left of a trial.
        self._won, self._plain_left = 0, 0

    def choose(self, most: int, context: int, narrows: bool = True) -> int:
        self._count, self._rate = 0, None
        if most == 0 or self._rest:
            return 0
        if not self._cycles and not self.costs.knows(context):
            self._rest = self.plain_run
            return 0
        now = self._now = self.costs.at(context)
        self.text.pass_over(self._unseen)
        rested, self._unseen = self._unseen > 0 or not self._cycles, 0
        tokens = self.text.expected_tokens(most)
        length = self._best_length(tokens, context)
        gain = tokens[length] / now.cycle[length] * now.plain
        if narrows:
            self._reading.judge(tokens, now)
        reads = narrows and self._reading.pays
        # A little reluctance to change: resting learns nothing about the text.
        wins = gain > (0.98 if self._won else 1.02) or reads
        if wins and self.allowance.credit > 0:
            self._draft(most if reads else length, gain, context)
            if reads:
                self._rate = self._reading.rate
        else:
            loss = now.cycle[length] / now.plain - tokens[length]
            if narrows and self.calibration.known:
                loss = min(loss, (now.cycle[0] + now.reading) / now.plain - 1)
                length, self._rate = most, 1 / now.plain
            self._hesitate(length, max(loss, self.least_loss), most, rested)
        return self._count

    def narrow(self, read: Callable[[], Sequence[float]]) -> int:
        if self._rate is None:
            return self._count
        tokens, rate = expected_tokens([self.calibration.chance(c) for c in read()]), self._rate
        cost = self._now.cycle
        return max(range(len(tokens)), key=lambda m: tokens[m] - rate * cost[m])

    def observe(self, cycle: Cycle) -> None:
        self.excursions.observe(cycle, self._now)
        if cycle.seconds is not None and not cycle.after_draft:
            self.costs.observe(
                cycle.context, cycle.verified, cycle.seconds, cycle.read, cycle.after_plain
            )
        if cycle.verified is None:
            self._unseen += 1
            self.learned.since_plain = 0.0
            self.learned.pace.plain()
            self._rest = max(self._rest - 1, 0)
            self.allowance.charge(1.0, 1)
            return
        seconds = self._now.cycle[cycle.verified] + (self._now.reading if cycle.read else 0.0)
        if cycle.seconds is not None and not cycle.after_plain:
            self.learned.pace.observe(cycle.seconds / seconds)
        self._cycles += 1
        self.learned.drafted += 1
        steps = seconds / self._now.plain + cycle.after_plain * self.excursions.steps
        self.learned.since_plain += steps
        self.allowance.charge(steps, cycle.accepted + 1)
        held_back: list[float] = []
        self._reading.observe(cycle.confidences)
        if cycle.confidences is not None:
            self.calibration.observe(cycle.confidences, cycle.verified, cycle.accepted)
            if cycle.read:
                rest = cycle.confidences[cycle.verified :]
                held_back = [self.calibration.chance(c) for c in rest]
        self.text.observe(cycle.verified, cycle.accepted, held_back)

    def finish(self) -> None:
        self.costs.save()

    def _best_length(self, tokens: list[float], context: int) -> int:
        """The length of the highest rate; one that was rarely timed gets a little in advance."""
        cost, tries = self._now.cycle, self.costs.tries(context)
        return max(
            range(1, len(tokens)),
            key=lambda m: tokens[m] / cost[m] * (1 + 0.1 / sqrt(1 + min(tries[m], 31))),
        )

    def _draft(self, count: int, gain: float, context: int) -> None:
        """Drafting wins; now and then plain decoding is timed all the same."""
        self._won += 1
        if self._plain_left == 0:
            loss = self.plain_run * max(1 - 1 / gain, 0.0)
            share = self.plain_share / (4 if self.costs.knows_plain(context) else 1)
            due = 0.0 if self.learned.pace.faster else loss / share
            if self.learned.since_plain > max(due, self.plain_interval):
                self._plain_left = self.plain_run
        if self._plain_left:
            self._plain_left -= 1
        else:
            self._count = count

    def _hesitate(self, count: int, loss: float, most: int, rested: bool) -> None:
        """Plain decoding wins; a look that may lose `loss` plain steps waits until it is worth it.

        The longer nobody looked, the likelier it is that the text has changed.
        """
        self._plain_left = self._won = 0
        believed, unknown = self.text.expect(most, self._saving)
        needed = loss / self.horizon
        patience = float(self.longest_rest)
        if believed > needed:
            patience = 0
        elif unknown > needed:
            patience = (needed - believed) / (unknown - believed) / self.text.unseen_jump
        elif self.learned.drafted < self.checks:
            patience = 0
        if not rested:
            patience = max(patience, loss / self.eager_share)
        self._rest = int(min(max(patience, self.allowance.wait(loss)), self.longest_rest))
        if self._rest == 0:
            self._count = count

    def _saving(self, tokens: list[float]) -> float:
        """The share of the time that drafting saves at its best length."""
        cost, plain = self._now.cycle, self._now.plain
        return max(1 - min(c / t for c, t in zip(cost, tokens, strict=False)) / plain, 0.0)
