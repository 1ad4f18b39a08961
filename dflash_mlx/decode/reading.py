"""Whether the confidences of a block are worth waiting for before its verify is queued."""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from dflash_mlx.decode.cost import Costs
from dflash_mlx.decode.value import Calibration, expected_tokens


class Reading:
    """Judges by the last blocks what choosing by confidence would have gained.

    Attributes:
        pays: whether it gains more than the wait costs.
        rate: tokens per second to be had without it.
    """

    blocks = 16
    interval = 8  # cycles between two judgements

    def __init__(self, calibration: Calibration):
        self.pays, self.rate = False, 0.0
        self._calibration = calibration
        self._recent: deque[Sequence[float]] = deque(maxlen=self.blocks)
        self._due = 0

    def observe(self, confidences: Sequence[float] | None) -> None:
        """Note what the draft said of a block, if it said anything."""
        self._due -= 1
        if confidences is not None:
            self._recent.append(confidences)

    def judge(self, tokens: Sequence[float], now: Costs) -> None:
        """Judge again if that is due.

        Args:
            tokens: expected of a verify of m = 0 … proposals, from history.
            now: what cycles cost.
        """
        if self._due <= 0:
            self._due = self.interval
            self.pays = self._gain(tokens, now) > (0.01 if self.pays else 0.03)

    def _gain(self, tokens: Sequence[float], now: Costs) -> float:
        """Tokens per cycle that reading gains, its cost paid."""
        if len(self._recent) < self.blocks // 2:
            return 0.0
        n = len(tokens) - 1
        gains = [b - a for a, b in pairwise(tokens)]
        usual = [b / a for a, b in zip([1.0, *gains], gains, strict=False)]
        blocks = []
        for confidences in self._recent:
            chances = [self._calibration.chance(c) for c in confidences[:n]]
            blocks.append(expected_tokens(chances + usual[len(chances) :]))
        # The rate that these very blocks give without reading, so that like meets like.
        mean = [sum(column) / len(blocks) for column in zip(*blocks, strict=True)]
        drafting = max(t / c for t, c in zip(mean[1:], now.cycle[1:], strict=False))
        self.rate = rate = max(drafting, 1 / now.plain)
        best = sum(max(t - rate * c for t, c in zip(b, now.cycle, strict=False)) for b in blocks)
        return best / len(blocks) - rate * now.reading
