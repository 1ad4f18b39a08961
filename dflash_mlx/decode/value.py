"""What a proposal is worth: the chance that the target accepts it, for this text."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import exp


def expected_tokens(chances: Sequence[float]) -> list[float]:
    """Tokens that a verify of m = 0 … len(chances) proposals yields on average, bonus included.

    Args:
        chances: of each proposal, given that those before it were accepted.
    """
    tokens, reached = [1.0], 1.0
    for chance in chances:
        reached *= chance
        tokens.append(tokens[-1] + reached)
    return tokens


class TextFilter:
    """How well the draft guesses the text at hand: a belief over levels, after Bayes.

    At level a, a proposal that is reached is accepted with chance a, times a factor of its position
    that is learned slowly. A text stays at its level and now and then jumps to any other, so the
    belief is narrow while the text is steady and moves within a few cycles when it changes.
    """

    ahead = 2  # unverified proposals whose chances tell something of the text
    levels = tuple(1 / (1 + exp(-0.75 * x)) for x in range(-6, 7))
    # Chance of a jump at a verify, and at each token whose proposals nobody saw.
    jump = 0.004
    unseen_jump = 0.001
    # What a text counts for when another one ends, and what an even belief counts for.
    fading = 0.8
    doubt = 0.5

    def __init__(self, positions: int):
        self._even = [1 / len(self.levels)] * len(self.levels)
        self._belief = list(self._even)
        # The mean beliefs of earlier texts, summed, and the sum over this one.
        self._texts = [0.0] * len(self.levels)
        self._here, self._verifies = list(self._texts), 0
        # Per position: acceptances seen, and expected by the level alone.
        self._accepted = [20.0] * positions
        self._expected = [20.0] * positions

    def begin(self) -> None:
        """A new text begins: probably like the ones before, possibly like none of them."""
        if self._verifies:
            pairs = zip(self._texts, self._here, strict=True)
            self._texts = [self.fading * old + new / self._verifies for old, new in pairs]
            self._here, self._verifies = [0.0] * len(self.levels), 0
        self._belief = [
            old + self.doubt * b for old, b in zip(self._texts, self._even, strict=True)
        ]
        self._settle(self._belief, 0.0)

    def expected_tokens(self, most: int) -> list[float]:
        """Tokens that a verify of m = 0 … most proposals yields on average, bonus included."""
        shape = self._shape(most)
        total = [0.0] * (most + 1)
        for belief, level in zip(self._belief, self.levels, strict=True):
            if belief < 0.001:
                continue
            reached = belief
            total[0] += reached
            for i in range(most):
                reached *= min(level * shape[i], 0.99)
                total[i + 1] += reached
        return list(accumulate(x / total[0] for x in total))

    def expect(self, most: int, worth: Callable[[list[float]], float]) -> tuple[float, float]:
        """The mean worth of a text: as believed, and where nothing is known about it.

        Args:
            worth: of a text whose verifies of m = 0 … most proposals yield so many tokens.
        """
        shape = self._shape(most)
        worths = [
            worth(expected_tokens([min(level * factor, 0.99) for factor in shape]))
            for level in self.levels
        ]
        believed = sum(b * w for b, w in zip(self._belief, worths, strict=True))
        return believed, sum(worths) / len(worths)

    def observe(self, verified: int, accepted: int, held_back: Sequence[float] = ()) -> None:
        """Learn from one verify.

        Args:
            verified: proposals verified.
            accepted: how many of them the target accepted.
            held_back: chances of proposals that were not verified because of them; without these
                the text would look better than it is.
        """
        judged = min(accepted + 1, verified)
        shape = self._shape(judged + 1)
        level = sum(b * a for b, a in zip(self._belief, self.levels, strict=True))
        for i in range(judged):
            self._accepted[i] = 0.99 * self._accepted[i] + (i < accepted)
            self._expected[i] = 0.99 * self._expected[i] + level
        belief = []
        for before, level in zip(self._belief, self.levels, strict=True):
            for i in range(accepted):
                before *= min(level * shape[i], 0.99)
            if accepted < verified:
                before *= 1 - min(level * shape[accepted], 0.99)
            elif held_back:
                for chance in held_back[: self.ahead]:
                    before *= level**chance * (1 - level) ** (1 - chance)
            belief.append(before)
        self._settle(belief, self.jump)
        self._here = [sum(pair) for pair in zip(self._here, self._belief, strict=True)]
        self._verifies += 1

    def pass_over(self, tokens: int) -> None:
        """Some tokens went by without a draft."""
        if tokens:
            self._settle(self._belief, min(self.unseen_jump * tokens, 0.5))

    def _settle(self, belief: list[float], jump: float) -> None:
        stay, other = (1 - jump) / sum(belief), jump / len(belief)
        self._belief = [b * stay + other for b in belief]

    def _shape(self, most: int) -> list[float]:
        pairs = zip(self._accepted[:most], self._expected[:most], strict=True)
        return [min(max(seen / expected, 0.5), 1.5) for seen, expected in pairs]


class Calibration:
    """What the draft's confidence means: how often proposals that had it were accepted."""

    edges = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
    fading = 0.998

    def __init__(self) -> None:
        bounds = (0.0, *self.edges, 1.0)
        # Taken at its word at first, with the weight of four proposals.
        self.known = False
        self._trials = [4.0] * (len(bounds) - 1)
        self._accepted = [2 * (a + b) for a, b in pairwise(bounds)]

    def chance(self, confidence: float) -> float:
        """The chance of a proposal with this confidence."""
        i = bisect_right(self.edges, confidence)
        return self._accepted[i] / self._trials[i]

    def observe(self, confidences: Sequence[float], verified: int, accepted: int) -> None:
        """Learn from one verify."""
        self.known = True
        for k in range(min(accepted + 1, verified)):
            i = bisect_right(self.edges, confidences[k])
            self._trials[i] = self._trials[i] * self.fading + 1
            self._accepted[i] = self._accepted[i] * self.fading + (k < accepted)
