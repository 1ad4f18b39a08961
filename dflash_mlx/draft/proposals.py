"""How proposals are taken from a draft's logits."""

from collections.abc import Callable
from typing import Protocol, cast

import mlx.core as mx

from dflash_mlx.propose import Proposals


class Choice(Protocol):
    """How tokens are taken from a draft's logits."""

    def __call__(self, logits: mx.array, position: int = 0) -> Proposals:
        """Logits [n, V] -> n proposals, each row on its own; the first is the block's `position`th.

        A block's proposals count from 0.
        """
        ...

    def among(self, position: int, scores: mx.array) -> tuple[mx.array, mx.array]:
        """One of a few candidates, for a draft that scores a position given the one before.

        Args:
            position: 0 … m - 1 in the block.
            scores: [k], the candidates' logits, in the order of their token ids.

        Returns:
            The index of the one taken and the draft's probability of it, both scalars.
        """
        ...


class Chosen:
    """A Choice made of a function that takes tokens from rows of logits, wherever these stand."""

    def __init__(self, choose: Callable[[mx.array], Proposals]):
        self._choose = choose

    def __call__(self, logits: mx.array, position: int = 0) -> Proposals:
        return self._choose(logits)

    def among(self, position: int, scores: mx.array) -> tuple[mx.array, mx.array]:
        taken = self._choose(scores[None]).tokens[0]
        return taken, mx.softmax(scores)[taken]


def as_choice(choose: Choice | Callable[[mx.array], Proposals]) -> Choice:
    """A Choice as it is, or one made of a function."""
    return cast(Choice, choose) if hasattr(choose, "among") else Chosen(choose)
