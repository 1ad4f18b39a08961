"""The verify length that pays, decided every cycle from measured cost and expected acceptance.

A cycle of cost C(m) that yields E(m) tokens runs at E(m) / C(m); plain decoding runs at 1 / plain.
Drafting is chosen when its best rate is higher. Reading the confidences of the block just drafted
allows a choice for this very block: with a rate r to be had otherwise, the best m is the one with
the largest E(m) - r C(m), and reading is worth the mean of that maximum, less r times its own cost.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt

from dflash_mlx.decode.cost import CostModel, Costs
from dflash_mlx.decode.schedule import Cycle
from dflash_mlx.decode.value import Calibration, TextFilter, expected_tokens


class Learned:
    """What outlives a generation.

    Attributes:
        costs: of cycles on this machine.
        calibration: what the draft's confidence means.
        text: how well the draft guesses.
        since_plain: time since plain decoding was last timed, in plain steps.
    """

    def __init__(self, costs: CostModel, positions: int):
        self.costs = costs
        self.calibration = Calibration()
        self.text = TextFilter(positions)
        self.since_plain = 0.0


class AdaptiveLength:
    """Chooses between a plain cycle and every verify length; learns over one generation.

    Whatever is believed to be worse is tried only as often as it may cost `trial_share` of all
    time.
    """

    learns = True
    trial_share = 0.01
    first_share = 0.06  # what the first tries may cost
    # Plain tokens until drafting is tried again: at first, and at most.
    first_rest, longest_rest = 4, 1024
    probe_cycles = 2  # the first one pays for the context's catching up, the second is typical
    plain_run = 5  # plain cycles timed together while drafting wins
    blocks_remembered = 16

    def __init__(self, learned: Learned):
        self.learned = learned
        self.costs, self.calibration, self.text = learned.costs, learned.calibration, learned.text
        self.text.begin()
        self._blocks: deque[Sequence[float]] = deque(maxlen=self.blocks_remembered)
        self._now: Costs = self.costs.at(0)
        self._count = 0
        self._cycles = 0
        # Reading confidences: whether it pays, and the rate to be had without it.
        self._reads, self._rate = False, 0.0
        # Plain decoding wins: plain tokens left, their number, cycles left of a trial of drafting.
        self._rest, self._pause, self._probes = 0, self.first_rest, 0
        self._unseen = 0
        # Drafting wins: for how many cycles, and plain cycles left of a trial.
        self._won, self._plain_left = 0, 0

    def choose(self, most: int, context: int, narrows: bool = True) -> int:
        self._count = 0
        if most == 0 or (self._rest and not self._probes):
            return 0
        now = self._now = self.costs.at(context)
        self.text.pass_over(self._unseen)
        self._unseen = 0
        tokens = self.text.expected_tokens(most)
        length = self._best_length(tokens, context)
        gain = tokens[length] / now.cycle[length] * now.plain
        if self._cycles % 8 == 0:
            self._reads = narrows and self._reading_pays(tokens)
        # A little reluctance to change: resting learns nothing about the text.
        if gain > (0.98 if self._won else 1.02) or self._reads:
            self._draft(most if self._reads else length, gain, context)
        else:
            self._hesitate(length, tokens[length])
        return self._count

    def narrow(self, read: Callable[[], Sequence[float]]) -> int:
        if not self._reads:
            return self._count
        tokens = expected_tokens([self.calibration.chance(c) for c in read()])
        cost = self._now.cycle
        return max(range(len(tokens)), key=lambda m: tokens[m] - self._rate * cost[m])

    def observe(self, cycle: Cycle) -> None:
        if cycle.seconds is not None:
            self.costs.observe(cycle.context, cycle.verified, cycle.seconds, cycle.read)
        if cycle.verified is None:
            self._unseen += 1
            self.learned.since_plain = 0.0
            self._rest = max(self._rest - 1, 0)
            return
        self._cycles += 1
        self.learned.since_plain += self._now.cycle[cycle.verified] / self._now.plain
        held_back: list[float] = []
        if cycle.confidences is not None:
            self.calibration.observe(cycle.confidences, cycle.verified, cycle.accepted)
            self._blocks.append(cycle.confidences)
            if cycle.read:
                rest = cycle.confidences[cycle.verified :]
                held_back = [self.calibration.chance(c) for c in rest]
        self.text.observe(cycle.verified, cycle.accepted, held_back)

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
        self._probes = self._rest = 0
        if self._won == 8:
            self._pause = self.first_rest
        if self._plain_left == 0:
            loss = self.plain_run * max(1 - 1 / gain, 0.0)
            share = self.trial_share / (4 if self.costs.knows_plain(context) else 1)
            if self.learned.since_plain > max(loss / share, 32):
                self._plain_left = self.plain_run
        if self._plain_left:
            self._plain_left -= 1
        else:
            self._count = count

    def _hesitate(self, length: int, tokens: float) -> None:
        """Plain decoding wins; drafting is tried after each rest, and the rests grow."""
        self._plain_left = 0
        now = self._now
        steps = now.cycle[length] / now.plain
        loss = self.probe_cycles * max(steps - tokens, 0.0)
        shortest = min(max(loss / self.first_share, self.first_rest), self.longest_rest)
        if self._won:
            self._won, self._rest, self._probes = 0, int(max(self._pause, shortest)), 0
        elif self._rest == 0:
            longest = min(max(loss / self.trial_share, shortest), self.longest_rest)
            self._pause = int(max(min(2 * self._pause, longest), shortest))
            self._rest, self._probes = self._pause, self.probe_cycles
        elif self._probes and tokens < 0.6 * steps:
            self._probes = 0  # one look was enough
        if self._probes:
            self._probes -= 1
            self._count = length

    def _reading_pays(self, tokens: list[float]) -> bool:
        """Whether choosing by confidence would have gained, over the last blocks."""
        if len(self._blocks) < self.blocks_remembered // 2:
            return False
        now, n = self._now, len(tokens) - 1
        gains = [b - a for a, b in pairwise(tokens)]
        usual = [b / a for a, b in zip([1.0, *gains], gains, strict=False)]
        blocks = []
        for confidences in self._blocks:
            chances = [self.calibration.chance(c) for c in confidences[:n]]
            blocks.append(expected_tokens(chances + usual[len(chances) :]))
        # The rate that these very blocks give without reading, so that like meets like.
        mean = [sum(column) / len(blocks) for column in zip(*blocks, strict=True)]
        drafting = max(t / c for t, c in zip(mean[1:], now.cycle[1:], strict=False))
        self._rate = rate = max(drafting, 1 / now.plain)
        best = sum(max(t - rate * c for t, c in zip(b, now.cycle, strict=False)) for b in blocks)
        gain = best / len(blocks) - rate * now.reading
        return gain > (0.01 if self._reads else 0.03)
