"""The verify length that pays, decided every cycle.

A cycle of m proposals takes C(m) plain steps and yields E(m) tokens, so it runs E(m) / C(m) times
as fast as plain decoding. The best m is drafted while that is above one, and copied where that is
above both. What is uncertain gets a little in advance, so that it is tried. While plain decoding
wins, a look at the draft is taken now and then, and while drafting wins, plain decoding is timed
now and then: as often as one account of what looks may lose allows, and ever more seldom while they
change nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log

from dflash_mlx.policy.chances import Text, expected
from dflash_mlx.policy.costs import OPTIMISM, SLOWLY, SURPRISE, Costs
from dflash_mlx.policy.learned import Learned
from dflash_mlx.policy.protocol import Cycle, Sign

FEW = 3  # proposals; the most that a look verifies, which tell as much as many
SURER = 0.05  # log; by how much drafting, or a copy, has to promise more than what is done anyway
PLAIN_RUN = 2  # plain cycles of a look at plain decoding, of which the last is not timed


class AdaptiveLength:
    """Chooses between a plain cycle and every verify length; learns over one generation."""

    learns = True
    reason: str | None = None

    def __init__(self, learned: Learned, trees: bool = False):
        """With `trees` proposals are grown to trees where these pay."""
        self.learned, self._trees, self.nodes = learned, trees, 0
        self._planned = self._plain_left = 0
        self._drafting = False
        self._looking: float | None = None  # plain steps that the look under way may lose
        self._begin(0)
        self._begun = False
        # Where the draft is waited for: costs, and tokens a plain step that each row has to beat.
        self._plan: tuple[Costs, float] | None = None
        self._decided = False

    def _begin(self, context: int) -> None:
        """Where the text begins, which may be long behind where its conversation did."""
        self._begun, self._place = True, self.learned.at(context)
        self._text = Text(self.learned.chances, self._place.texts)
        # A new text may be of another kind, and need not wait as long.
        self._rest = replace(self._place.rest, left=self._place.rest.left / 2)

    def _costs(self, context: int) -> Costs:
        """What cycles cost now; the first time that this is asked, the text begins."""
        if not self._begun:
            self._begin(context)
        return self.learned.at(context).costs

    def copy(self, chances: Sequence[float], context: int) -> int:
        costs = self._costs(context)
        tokens, steps = expected(chances), costs.copied()
        worth, m = max((t / s, m) for m, (t, s) in enumerate(zip(tokens, steps, strict=False)))
        drafted = self._text.tokens(len(chances))
        rival = max(1.0, *(t / s for t, s in zip(drafted, costs.steps(), strict=False)))
        # A look at plain decoding is not disturbed.
        return m if not self._plain_left and log(worth / rival) > SURER else 0

    def choose(self, most: int, context: int) -> int:
        self._planned, self._plan, self.nodes = 0, None, 0
        if self._plain_left or not most:
            self._plain_left = max(self._plain_left - 1, 0)
            return 0
        costs = self._costs(context)
        # Once it was decided for this text, by those before it, nothing changes while it rests.
        resting = self._decided and self._rest.left > 0 and not costs.guessed
        if resting and not self._drafting and self._looking is None:
            return 0
        self._decided, steps = True, costs.steps()
        # With nothing known the draft comes first: where it guesses right, its cycles tell most.
        reach = min(most, FEW) if costs.guessed else most
        tokens = self._text.tokens(reach)
        values = [log(t / s) for t, s in zip(tokens, steps, strict=False)]
        best = max(range(1, reach + 1), key=values.__getitem__)
        wins = values[best] > (0.0 if self._drafting else SURER)
        if self._looking is not None:
            self._rest.begin(self._looking)
            self._looking = None
        if wins != self._drafting:
            self._drafting = wins
            self._rest.end()
        self.reason = None
        if not wins:
            self.reason = (
                f"a cycle of {best} proposals takes {steps[best]:.1f} plain steps here and is "
                f"expected to give {tokens[best]:.1f} tokens"
            )
            self._planned = self._look(costs, tokens, min(most, FEW))
            return self._planned
        unsure = values[best] < SURPRISE * costs.doubt(best)
        loss = PLAIN_RUN * (1 - steps[best] / tokens[best])
        if costs.drafts and unsure and self._may_look(loss):
            self.learned.account.charge(loss, 0)
            self._looking, self._plain_left = loss, PLAIN_RUN - 1
            return 0
        lengths = range(1, reach + 1)
        m = max(lengths, key=lambda m: values[m] + OPTIMISM * costs.doubt(m, costs.last))
        self._planned, rate = m, tokens[best] / steps[best]
        gain = self.learned.gain - rate * steps[m] * costs.reading
        if self._trees and self.learned.branches.wanted(costs, best, rate, max(gain, 0.0)):
            self.nodes = costs.counts[-1]
        if gain > 0 or self.nodes:
            self._plan = costs, rate
            return reach
        return m

    def _look(self, costs: Costs, tokens: Sequence[float], few: int) -> int:
        """Plain decoding wins: proposals of a look at the draft, or 0. A few tell most."""
        steps = costs.steps()
        hopes = [log(t / s) for t, s in zip(tokens, steps, strict=False)]
        m = max(range(1, few + 1), key=lambda m: hopes[m] + OPTIMISM * costs.doubt(m))
        loss = steps[m] + costs.detour - tokens[m]
        if self.learned.looked:
            self._looking = loss if self._may_look(loss) else None
        else:
            self._looking = 0.0  # costs from elsewhere that nothing contradicts would hold for ever
        return 0 if self._looking is None else m

    def _may_look(self, loss: float) -> bool:
        """Whether a look may be taken that loses so many plain steps if it changes nothing."""
        return self._rest.left <= 0 and self.learned.account.pays(loss)

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        confidences = read() if self._plan else ()
        if self._plan is None or not confidences:
            return self._planned
        (costs, rate), tokens = self._plan, self.learned.chances.tokens(confidences)
        worth = [t - rate * s for t, s in zip(tokens, costs.steps(), strict=False)]
        return max(range(len(worth)), key=worth.__getitem__)

    def prune(self, chances: Sequence[float]) -> int:
        assert self._plan
        return self.learned.branches.size(chances, *self._plan)

    def observe(self, cycle: Cycle) -> None:
        learned, costs = self.learned, self.learned.at(cycle.context).costs
        costs.observe(cycle)
        taken = costs.taken(cycle)
        self._rest.left -= taken
        learned.branches.rest.left -= taken
        learned.account.charge(taken, cycle.accepted + 1)
        if cycle.tree:
            learned.branches.observe(cycle.tree)
            self._text.observe(cycle.tree.line, cycle.tree.kept)
        elif cycle.drafted:
            self._trees &= not (self.nodes and cycle.verified)  # the target takes none
            if cycle.confidences:
                self._judge_reading(cycle.confidences, costs.steps())
            learned.chances.observe(cycle.confidences, cycle.verified, cycle.accepted)
            self._text.observe(cycle.verified, cycle.accepted)
        else:
            self._text.pass_over()

    def _judge_reading(self, confidences: Sequence[Sign], steps: Sequence[float]) -> None:
        """What choosing by these confidences would have gained."""
        usual = self._text.tokens(len(confidences))
        now = self.learned.chances.tokens(confidences)
        best = max(range(1, len(usual)), key=lambda m: usual[m] / steps[m])
        rate = max(usual[best] / steps[best], 1.0)
        worth = [t - rate * s for t, s in zip(now, steps, strict=False)]
        self.learned.gain += SLOWLY * (max(worth) - worth[best] - self.learned.gain)

    def finish(self) -> None:
        self._place.texts, self._place.rest = self._text.with_this(), self._rest
        self.learned.save()
