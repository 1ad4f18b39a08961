"""Whether a tree pays, and how many of its nodes: each as long as its chance is worth its row.

A tree costs a wait for the draft, and rows. What it gives beyond the best line is known from those
that were grown: in every cycle while trees win, and while lines win from a look now and then.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import exp

from dflash_mlx.policy.chances import Regression, log_odds
from dflash_mlx.policy.costs import OPTIMISM, SLOWLY, Costs
from dflash_mlx.policy.looks import Rest
from dflash_mlx.policy.protocol import Grown


class Branches:
    """What generations of a pair have found out about trees.

    Attributes:
        gain: tokens that a tree's cycle gives beyond what a line's would in the same time.
        rest: until the next look.
    """

    def __init__(self) -> None:
        self.gain, self.rest = 0.0, Rest()
        self._growing = False
        self._meaning = Regression([0.0, 1.0])  # of the chance that a draft gives a node

    def wanted(self, costs: Costs, m: int, rate: float, rival: float) -> bool:
        """Whether to grow one now, because it pays or as a look.

        Args:
            m: proposals of the best line.
            rate: tokens that this line gives in a plain step's time.
            rival: tokens by which a cycle without a tree may be better than that.
        """
        if self.gain > rival:
            self.rest.end()
        elif self._growing and self.gain < rival:
            self._growing = False
            self.rest.begin((rival - self.gain) / SLOWLY / rate)
        if not self._growing and self.rest.left <= 0 and self._may_pay(costs, m, rate):
            self._growing, self.gain = True, rival
        return self._growing

    def _may_pay(self, costs: Costs, m: int, rate: float) -> bool:
        """Whether rows beyond those of m proposals are cheap enough for any branch."""
        line, *larger = zip(costs.trees()[m:], costs.counts[m:], strict=True)
        cheapest = min((steps - line[0]) / (n - m) for steps, n in larger)
        return rate * cheapest < 0.5  # no token that another one is preferred to is likelier

    def size(self, chances: Sequence[float], costs: Costs, rate: float) -> int:
        """How many of the best nodes are worth verifying, of those that the draft gives these
        chances; what the tree gains is counted on the way."""
        nodes = [(1.0, log_odds(chance)) for chance in chances]
        tokens = list(accumulate(map(self._meaning.chance, nodes), initial=1.0))
        sizes = [n for n in costs.counts if n < len(tokens)]
        steps = costs.trees()
        worth = [tokens[n] - rate * s for n, s in zip(sizes, steps, strict=False)]
        self.gain += SLOWLY * (max(worth) - self.gain)
        # Sizes whose cost is unsure get a little in advance.
        hoped = [exp(-OPTIMISM * costs.doubt(n, costs.last)) for n in sizes]
        hopes = [tokens[n] - rate * s * h for n, s, h in zip(sizes, steps, hoped, strict=False)]
        return sizes[max(range(len(sizes)), key=hopes.__getitem__)]

    def observe(self, grown: Grown) -> None:
        """Learn what chances mean, from the nodes of a verify."""
        for chance, passed in zip(grown.chances, grown.passed, strict=True):
            self._meaning.learn((1.0, log_odds(chance)), passed)
