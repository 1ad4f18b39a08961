"""The verify length that pays, decided every cycle.

A cycle of m proposals takes C(m) plain steps and yields E(m) tokens, so it runs E(m) / C(m) times
as fast as plain decoding. The best m is drafted while that is above one, and copied where that is
above both. What is uncertain gets a little in advance, so that it is tried; lengths are reached by
doublings. While plain decoding wins, a look at the draft is taken now and then, and while drafting
wins, plain decoding is timed now and then: as often as one account of what looks may lose allows,
and ever more seldom while they change nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log

from dflash_mlx.policy.branches import Branches
from dflash_mlx.policy.chances import LEVELS, NO_TEXTS, Chances, Text, expected
from dflash_mlx.policy.costs import (
    FIRST_REACH,
    GUESS,
    LEAST_DRAFT,
    LONG_REST,
    OPTIMISM,
    SECOND_HAND,
    SHORT_REST,
    SLOWLY,
    Costs,
)
from dflash_mlx.policy.kept import Store
from dflash_mlx.policy.protocol import Cycle, Kind, Sign

SURER = 0.15  # share by which a copy has to promise more than drafting or plain decoding
LOOKING = 0.02  # share of the time that looks may lose
CREDIT = 12.0  # plain steps; the most that looks may lose at once, beside their share
PLAIN_RUN = 2  # plain cycles of a look at plain decoding, of which the last is not timed


@dataclass
class Place:
    """What generations have learned near one context length; drafts differ in how far they reach.

    Attributes:
        costs: of cycles there.
        texts: what the texts that began there were like, see `Text`.
        rest: plain steps until the next look, when the latest of them ended.
        patience: the rest behind the next look, in what it may lose.
    """

    costs: Costs
    texts: Sequence[float] = NO_TEXTS
    rest: float = 0.0
    patience: float = SHORT_REST


class Learned:
    """What outlives a generation, and generations of a pair that take turns share."""

    def __init__(self, most: int, store: Store | None = None, costs: Costs | None = None):
        """Start from costs that are kept in a store, from given ones, or from none.

        Args:
            most: proposals of a block.
        """
        kept = store.load(most) if store else {}
        self._store = store
        self._places = {level: Place(Costs.known(*seconds)) for level, seconds in kept.items()}
        if costs or not kept:
            self._places[0] = Place(costs or Costs(most))
        self.chances = Chances(most)
        # Tokens a cycle that choosing by confidence yields beyond choosing by depth.
        self.gain = 0.0
        self.branches = Branches()
        self.credit = CREDIT / 2  # plain steps that looks may lose

    def at(self, context: int) -> Place:
        """The place of `context` tokens in the target's cache, which are taken in doublings."""
        level = (context >> 9).bit_length()
        if level not in self._places:
            near = min(self._places, key=lambda known: abs(known - level))
            found = self._places[near]
            # Good texts behind half the context promise little, bad ones no better.
            shares = [SECOND_HAND if logit > 0 and level > near else 1.0 for logit in LEVELS]
            texts = [share * t for share, t in zip(shares, found.texts, strict=True)]
            costs = found.costs.near(abs(level - near))
            self._places[level] = replace(found, costs=costs, texts=texts)
        return self._places[level]

    @property
    def looked(self) -> bool:
        """Whether a drafted cycle was timed in this process."""
        return any(place.costs.timed or place.costs.frozen for place in self._places.values())

    def charge(self, steps: float, tokens: int) -> None:
        """A cycle took so many plain steps and gave so many tokens; what it gains pays back."""
        self.credit = min(self.credit + LOOKING * steps + tokens - steps, CREDIT)

    def save(self) -> None:
        """Keep the costs."""
        if self._store:
            costs = {level: place.costs for level, place in self._places.items()}
            self._store.save({level: c.seconds() for level, c in costs.items() if c.settled})


class AdaptiveLength:
    """Chooses between a plain cycle and every verify length; learns over one generation."""

    learns = True
    reason: str | None = None

    def __init__(self, learned: Learned, trees: bool = False):
        """With `trees` proposals are grown to trees where these pay."""
        self.learned, self._trees, self.nodes = learned, trees, 0
        self._context = 0
        self._drafting = self._looking = self._reads = False
        self._planned = self._plain_left = 0
        self._loss = 0.0
        self._begin(0)
        self._begun = False
        self._rate: float | None = None  # tokens a plain step that reading has to beat, if it does
        self._steps: list[float] = []

    def _begin(self, context: int) -> None:
        """Where the text begins, which may be long behind where its conversation did."""
        self._begun, self._place = True, self.learned.at(context)
        self._text = Text(self.learned.chances, self._place.texts)
        # A new text may be of another kind, and need not wait as long.
        self._rest = self._place.rest / 2

    def _costs(self, context: int) -> Costs:
        """What cycles cost now; the first time that this is asked, the text begins."""
        if not self._begun:
            self._begin(context)
        return self.learned.at(context).costs

    def copy(self, chances: Sequence[float], context: int) -> int:
        costs = self._costs(context)
        tokens, steps = expected(chances[: costs.within(len(chances))]), costs.copied()
        worth, m = max((t / s, m) for m, (t, s) in enumerate(zip(tokens, steps, strict=False)))
        if self._plain_left or worth < 1 + SURER:
            return 0  # a look at plain decoding is not disturbed
        drafted = self._text.tokens(costs.within(len(chances)))
        rival = max(t / s for t, s in zip(drafted, costs.steps(), strict=False))
        return m if worth > rival * (1 + SURER) else 0

    def choose(self, most: int, context: int) -> int:
        self._planned, self._rate, self.nodes, self._context = 0, None, 0, context
        if self._plain_left or not most:
            self._plain_left = max(self._plain_left - 1, 0)
            return 0
        costs = self._costs(context)
        # Once it was decided for this text, by those before it, nothing changes while it rests.
        if self._steps and self._rest > 0 and not self._drafting and not self._looking:
            return 0
        self._steps = steps = costs.steps()
        reach = costs.within(most)
        tokens = self._text.tokens(reach)
        values = [log(t / s) for t, s in zip(tokens, steps, strict=False)]
        best = max(range(1, reach + 1), key=values.__getitem__)
        wins = values[best] > (0.0 if self._drafting else LEAST_DRAFT)
        if self._looking:
            self._looking, self._rest = False, self._place.patience * self._loss
            self._place.patience = min(2 * self._place.patience, LONG_REST)
        if wins != self._drafting:
            self._drafting, self._rest, self._place.patience = wins, 0.0, SHORT_REST
        self.reason = None
        if not wins:
            self.reason = (
                f"a cycle of {best} proposals takes {steps[best]:.1f} plain steps here and is "
                f"expected to give {tokens[best]:.1f} tokens"
            )
            self._planned = self._look(costs, tokens, reach)
            return self._planned
        # With nothing known the draft comes first: where it guesses right, its cycles tell most.
        unsure = not costs.plain_timed or values[best] < OPTIMISM * costs.doubt(best)
        if costs.timed and unsure:
            loss = PLAIN_RUN * (1 - steps[best] / tokens[best])
            if self._may_look(loss):
                self.learned.credit -= loss
                self._looking, self._plain_left = True, PLAIN_RUN - 1
                return 0
        lengths = range(1, reach + 1)
        m = max(lengths, key=lambda m: values[m] + OPTIMISM * costs.doubt(m, costs.last))
        self._planned = m
        # A little reluctance to change.
        price = steps[m] * costs.reading * (0.8 if self._reads else 1.2)
        self._reads = self.learned.gain > price
        rate = tokens[best] / steps[best]
        rival = self.learned.gain - price if self._reads else 0.0
        if self._trees and self.learned.branches.wanted(costs, best, rate, rival):
            self.nodes = max(n for n in costs.counts if n <= costs.within(costs.counts[-1]))
        if self._reads or self.nodes:
            self._rate = rate
            return reach
        return m

    def _look(self, costs: Costs, tokens: Sequence[float], reach: int) -> int:
        """Plain decoding wins: proposals of a look at the draft, or 0."""
        hoped, steps = self._text.hopes(reach), self._steps
        hopes = [log(hoped[m] / steps[m]) + OPTIMISM * costs.doubt(m) for m in range(reach + 1)]
        # A few proposals tell as much as many, and cost less.
        m = max(range(1, min(reach, FIRST_REACH) + 1), key=hopes.__getitem__)
        # Costs from elsewhere that nothing contradicts would hold for ever.
        first = not self.learned.looked
        loss = steps[m] + costs.detour - tokens[m]
        self._looking = (self._may_look(loss) and max(hopes) > 0) or first
        if first:
            self._loss = GUESS
        return m if self._looking else 0

    def _may_look(self, loss: float) -> bool:
        """Whether a look may be taken that loses so many plain steps if it changes nothing."""
        self._loss = max(loss, GUESS)
        return self._rest <= 0 and self.learned.credit >= self._loss

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        rate = self._rate
        confidences = read() if rate is not None else ()
        if rate is None or not confidences:
            return self._planned
        tokens = self.learned.chances.tokens(confidences)
        return max(range(len(tokens)), key=lambda m: tokens[m] - rate * self._steps[m])

    def prune(self, chances: Sequence[float]) -> int:
        rate = self._rate or 1.0
        return self.learned.branches.size(chances, self.learned.at(self._context).costs, rate)

    def observe(self, cycle: Cycle) -> None:
        learned, costs = self.learned, self.learned.at(cycle.context).costs
        costs.observe(cycle)
        taken, steps = 1.0, costs.steps()
        if cycle.copied:
            taken = costs.copied()[cycle.verified]
        elif cycle.tree:
            taken = costs.tree(cycle.verified)
            learned.branches.observe(cycle.tree)
        elif cycle.drafted:
            if self.nodes and cycle.verified:
                self._trees = False  # the target takes none
            taken = steps[cycle.verified] * (1 + costs.reading * cycle.read)
            if cycle.lap.kind is Kind.ENTRY:
                taken += costs.detour
            if cycle.confidences:
                self._judge_reading(cycle.confidences, steps)
            learned.chances.observe(cycle.confidences, cycle.verified, cycle.accepted)
        held_back = None
        if cycle.read and cycle.verified < len(cycle.confidences):
            confidence = cycle.confidences[cycle.verified]
            held_back = learned.chances.chance(confidence, cycle.verified)
        if cycle.copied:
            self._text.pass_over()
        elif cycle.tree:
            self._text.observe(cycle.tree.line, cycle.tree.kept)
        else:
            self._text.observe(cycle.verified, cycle.accepted, held_back)
        self._rest -= taken
        learned.branches.rest -= taken
        learned.charge(taken, cycle.accepted + 1)

    def _judge_reading(self, confidences: Sequence[Sign], steps: Sequence[float]) -> None:
        """What choosing by these confidences would have gained."""
        usual = self._text.tokens(len(confidences))
        now = self.learned.chances.tokens(confidences)
        best = max(range(1, len(usual)), key=lambda m: usual[m] / steps[m])
        rate = max(usual[best] / steps[best], 1.0)
        worth = [t - rate * s for t, s in zip(now, steps, strict=False)]
        gain = (max(worth) - worth[best]) / rate
        self.learned.gain += SLOWLY * (gain - self.learned.gain)

    def finish(self) -> None:
        self._place.texts = self._text.with_this()
        self._place.rest = max(self._rest, 0.0)
        self.learned.save()
