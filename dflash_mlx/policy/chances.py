"""The chance that the target accepts a proposal: two logistic regressions.

One goes by depth, for a block that is not drafted yet, with a bias of the text at hand; the other
by the draft's confidence. Where a head of the draft's gives that, the likelihood of the token
itself stands beside it, and how much each counts is learnt.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import exp, log, log1p
from operator import mul

from dflash_mlx.policy.costs import SLOWLY
from dflash_mlx.policy.protocol import Sign

LEVELS = tuple(0.8 * i for i in range(-5, 6))  # logits; biases that a text may have, 2 % to 98 %
NO_TEXTS = (0.0,) * len(LEVELS)
JUMP = 0.003  # chance per token that the text changes to any other level
FADING = 0.8  # what a text counts for when another one has ended
UNKNOWN = 0.5  # texts; what an even belief counts for at the start of one


class Regression:
    """A logistic regression that follows what it sees."""

    def __init__(self, weights: Sequence[float]):
        self._weights = list(weights)

    def chance(self, features: Sequence[float]) -> float:
        return _sigmoid(sum(map(mul, self._weights, features)))

    def learn(self, features: Sequence[float], came: bool) -> None:
        """Something of which these are the features came true, or did not."""
        step = SLOWLY * (came - self.chance(features))
        self._weights = [w + step * f for w, f in zip(self._weights, features, strict=True)]


class Chances:
    """What generations of a pair have in common."""

    def __init__(self, most: int):
        self.table = [[_sigmoid(level)] * most for level in LEVELS]  # by level and depth
        self._depths = [0.0] * most
        self._confidence: Regression | None = None

    def correct(self, depth: int, error: float) -> None:
        """A proposal's fate was so much better than its chance by depth."""
        self._depths[depth] += SLOWLY * error
        for row, level in zip(self.table, LEVELS, strict=True):
            row[depth] = _sigmoid(level + self._depths[depth])

    def tokens(self, confidences: Sequence[Sign]) -> list[float]:
        """Tokens that a verify of the first m = 0, 1, … proposals yields on average."""
        chances = []
        for depth, confidence in enumerate(confidences):
            features = _features(confidence, depth)
            chances.append(self._regression(features).chance(features))
        return expected(chances)

    def observe(self, confidences: Sequence[Sign], verified: int, accepted: int) -> None:
        """Learn what confidences mean."""
        for depth, confidence in enumerate(confidences[: min(accepted + 1, verified)]):
            features = _features(confidence, depth)
            self._regression(features).learn(features, depth < accepted)

    def _regression(self, features: Sequence[float]) -> Regression:
        """At first all views of a confidence count the same, and are believed."""
        if self._confidence is None:
            views = len(features) - 2
            self._confidence = Regression([0.0, 0.0, *[1 / views] * views])
        return self._confidence


def _features(confidence: Sign, depth: int) -> list[float]:
    views = confidence if isinstance(confidence, Sequence) else (confidence,)
    return [1.0, log1p(depth), *map(log_odds, views)]


class Text:
    """How well the draft guesses one text: a belief over levels, after Bayes.

    A text stays at its level and now and then jumps to any other, so the belief is narrow while the
    text is steady, and moves within a few cycles when it changes. It begins like those before it.
    """

    def __init__(self, chances: Chances, before: Sequence[float] = NO_TEXTS):
        """Begin like the texts before, of which `before` is what `with_this` gave."""
        self._chances, self._before = chances, before
        self._sum, self._verifies = [0.0] * len(LEVELS), 0
        self._belief = _normal([t + UNKNOWN / len(LEVELS) for t in before])

    def tokens(self, most: int) -> list[float]:
        """Tokens that a verify of m = 0 … most proposals yields on average, bonus included."""
        gains = [0.0] * most
        for share, row in zip(self._belief, self._chances.table, strict=True):
            for depth in range(most if share > 0.001 else 0):
                share *= row[depth]
                gains[depth] += share
        return _sums(gains)

    def observe(self, verified: int, accepted: int) -> None:
        """Learn from a drafted cycle. Where no proposal was worth a verify, the first counts as
        rejected: the text would look better than it is without those that are held back."""
        verified = max(verified, 1)
        tokens = self.tokens(min(accepted + 1, verified))
        belief = []
        for share, row in zip(self._belief, self._chances.table, strict=True):
            for depth in range(accepted):
                share *= row[depth]
            belief.append(share * (1 - row[accepted]) if accepted < verified else share)
        reached = [b - a for a, b in zip([0.0, *tokens], tokens, strict=False)]
        for depth in range(len(tokens) - 1):
            chance = reached[depth + 1] / reached[depth]
            self._chances.correct(depth, (depth < accepted) - chance)
        self._belief = _normal(belief)
        self.pass_over()
        self._sum = [a + b for a, b in zip(self._sum, self._belief, strict=True)]
        self._verifies += 1

    def pass_over(self) -> None:
        """A token went by."""
        self._belief = [b * (1 - JUMP) + JUMP / len(LEVELS) for b in self._belief]

    def with_this(self) -> Sequence[float]:
        """The sum of the mean beliefs of all texts so far, by level, each faded."""
        if not self._verifies:
            return self._before
        pairs = zip(self._before, self._sum, strict=True)
        return [FADING * t + s / self._verifies for t, s in pairs]


def _normal(shares: Sequence[float]) -> list[float]:
    total = sum(shares)
    return [s / total for s in shares]


def _sums(gains: Iterable[float]) -> list[float]:
    sums = [1.0]
    for gain in gains:
        sums.append(sums[-1] + gain)
    return sums


def expected(chances: Iterable[float]) -> list[float]:
    """Tokens that a verify of the first m = 0, 1, … proposals with these chances yields."""
    return _sums(accumulate(chances, mul))


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def log_odds(chance: float) -> float:
    """Of what may be 0 or 1, to which nobody is as sure as that."""
    chance = min(max(chance, 0.01), 0.99)
    return log(chance / (1 - chance))
