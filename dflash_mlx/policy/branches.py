"""Whether a tree pays, and how many of its nodes: each as long as its chance is worth its row.

A tree costs a wait for the draft, and rows. What it gives beyond the best line is known from those
that were grown: in every cycle while trees win, and while lines win from a look now and then.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import exp, log

from dflash_mlx.policy.costs import GUESS, LONG_REST, OPTIMISM, SHORT_REST, SLOWLY, Costs
from dflash_mlx.policy.protocol import Grown

MARGIN = 0.1  # tokens a cycle; of a tree that gives so much more, or less, it is believed
LIKELIEST = 0.5  # chance; no token that another one is preferred to has more


class Branches:
    """What generations of a pair have found out about trees.

    Attributes:
        gain: tokens that a tree's cycle gives beyond what a line's would in the same time.
        rest: plain steps until the next look.
    """

    def __init__(self) -> None:
        self.gain = self.rest = 0.0
        self._patience = SHORT_REST
        self._growing = False
        self._bias, self._slope = 0.0, 1.0  # of the log-odds of a node's chance

    def wanted(self, costs: Costs, m: int, rate: float, rival: float) -> bool:
        """Whether to grow one now, because it pays or as a look.

        Args:
            m: proposals of the best line.
            rate: tokens that this line gives in a plain step's time.
            rival: tokens by which a cycle without a tree may be better than that.
        """
        if self.gain > rival + MARGIN:
            self._patience = SHORT_REST
        elif self._growing and self.gain < rival - MARGIN:
            lost = (rival - self.gain) / SLOWLY / rate
            self._growing, self.rest = False, self._patience * max(lost, GUESS)
            self._patience = min(2 * self._patience, LONG_REST)
        if not self._growing and self.rest <= 0 and self._may_pay(costs, m, rate):
            self._growing, self.gain = True, rival
        return self._growing

    def chance(self, drafts: float) -> float:
        """That the target goes through a node to which the draft gives so much."""
        return 1 / (1 + exp(-self._bias - self._slope * _log_odds(drafts)))

    def _may_pay(self, costs: Costs, m: int, rate: float) -> bool:
        """Whether rows beyond those of m proposals are cheap enough for any branch."""
        if m > costs.reach:
            return False  # the line comes first
        costs.widen()
        steps = costs.trees()
        further = zip(costs.counts[m + 1 :], steps[m + 1 :], strict=True)
        return any(rate * (s - steps[m]) / (n - m) < LIKELIEST for n, s in further)

    def size(self, chances: Sequence[float], costs: Costs, rate: float) -> int:
        """How many of the best nodes are worth verifying, of those that the draft gives these
        chances; what the tree gains is counted on the way."""
        tokens = list(accumulate(map(self.chance, chances), initial=1.0))
        sizes = [n for n in costs.counts if n < len(tokens)]
        steps = costs.trees()
        worth = [tokens[n] - rate * s for n, s in zip(sizes, steps, strict=False)]
        self.gain += SLOWLY * (max(worth) - self.gain)
        hoped = [exp(-OPTIMISM * costs.doubt(n, costs.last)) for n in sizes]
        hopes = [tokens[n] - rate * s * h for n, s, h in zip(sizes, steps, hoped, strict=False)]
        return sizes[max(range(len(sizes)), key=hopes.__getitem__)]

    def observe(self, grown: Grown) -> None:
        """Learn what chances mean, from the nodes of a verify."""
        errors = [p - self.chance(c) for c, p in zip(grown.chances, grown.passed, strict=True)]
        self._bias += SLOWLY * sum(errors)
        logs = map(_log_odds, grown.chances)
        self._slope += SLOWLY * sum(e * x for e, x in zip(errors, logs, strict=True))


def _log_odds(chance: float) -> float:
    chance = min(max(chance, 0.001), 0.999)
    return log(chance / (1 - chance))
