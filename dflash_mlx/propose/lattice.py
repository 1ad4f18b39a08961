"""The candidates of a block, of which a tree is made."""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from dflash_mlx.propose.tree import Tree, grow


@dataclass
class Lattice:
    """The likeliest tokens of each position and how likely they are, all lazy.

    Attributes:
        tokens: [m, k] token ids, those of a row all different.
        scores: [m, k] log-probabilities, where positions stand alone; or [m, k, k], where entry
            t, a, b is of candidate b at position t behind candidate a at position t - 1. All of
            position 0 stands behind the anchor.
    """

    tokens: mx.array
    scores: mx.array

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        """What is to be computed before a tree can be grown."""
        return self.tokens, self.scores

    def grow(self, budget: int) -> Tree:
        """The best tree of at most `budget` nodes. Waits for the device."""
        mx.eval(self.tokens, self.scores)
        scores = self.scores if self.scores.ndim == 3 else self.scores[:, None]
        tokens = cast(list[list[int]], self.tokens.tolist())
        return grow(tokens, cast(list[list[list[float]]], scores.tolist()), budget)


def likeliest(logits: mx.array, width: int, temp: float = 1.0) -> Lattice:
    """Positions that stand alone: logits [m, V] -> their `width` likeliest tokens."""
    logits = logits.astype(mx.float32) * (1.0 / temp)
    width = min(width, logits.shape[-1])
    tokens = mx.argpartition(-logits, kth=width - 1, axis=-1)[:, :width]
    own = mx.take_along_axis(logits, tokens, axis=-1)
    return Lattice(tokens, own - mx.logsumexp(logits, axis=-1, keepdims=True))
