"""What a head works on: one block after the backbone."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.proposals import Choice
from dflash_mlx.propose import Lattice, Proposals
from dflash_mlx.propose.lattice import likeliest


@dataclass
class Block:
    """One block after the draft's final norm.

    Attributes:
        anchor: [1], the token at the block's first position.
        before: [1], the token before it.
        hidden: [B, H], all rows.
        first: the first row that proposes.
        count: proposals asked for.
        logits: hidden states [n, H] -> base logits [n, Vd], cap and multiplier applied.
        embed: tokens [n] -> embeddings [n, H].
        spread: logits [n, Vd] -> [n, V], over the target's ids; -inf where the draft has no row.
        to_target: draft ids -> the target's.
    """

    anchor: mx.array
    before: mx.array
    hidden: mx.array
    first: int
    count: int
    logits: Callable[[mx.array], mx.array]
    embed: Callable[[mx.array], mx.array]
    spread: Callable[[mx.array], mx.array]
    to_target: Callable[[mx.array], mx.array]

    @property
    def rows(self) -> mx.array:
        """[count, H], the rows that propose."""
        return self.hidden[self.first : self.first + self.count]


class Head(nn.Module):
    """From a block to proposals.

    Attributes:
        name: under which its parameters are published; "" where it has none.
        samples: whether a position is drawn given the one before it, so that sampled blocks hang
            together. Rows that stand alone are accepted more often when the likeliest are taken.
    """

    name = ""
    samples = False

    def propose(self, block: Block, choose: Choice) -> Proposals:
        """Proposals for `block.count` positions, in the target's ids."""
        raise NotImplementedError

    def lattice(self, block: Block, choose: Choice, width: int, temp: float) -> Lattice:
        """Candidates for a tree: here each row's likeliest tokens, as the head gives the row behind
        the tokens that it proposes itself.

        Args:
            block: the block.
            choose: as for `propose`.
            width: candidates of a position.
            temp: temperature of the text to come, 1 where it is greedy.
        """
        kept = _Kept(choose)
        self.propose(block, kept)
        return likeliest(mx.concatenate(kept.rows), width, temp)

    def embed_previous(self, tokens: mx.array) -> mx.array | None:
        """A chain's embedding [n, r] of the tokens before the rows; None where there is none."""
        return None


class _Kept:
    """A Choice that keeps the rows it chooses from."""

    def __init__(self, choose: Choice):
        self._choose = choose
        self.rows: list[mx.array] = []

    def __call__(self, logits: mx.array, position: int = 0) -> Proposals:
        self.rows.append(logits)
        return self._choose(logits, position)

    def among(self, position: int, scores: mx.array) -> tuple[mx.array, mx.array]:
        return self._choose.among(position, scores)


def chained(block: Block, choose: Choice, logits: Callable[[int, mx.array], mx.array]) -> Proposals:
    """Choose one token after the other.

    Args:
        block: the block.
        choose: called once for each row, in order.
        logits: (j, the token before [1]) -> logits [1, Vd] of the block's j-th proposal.
    """
    before, parts = block.anchor, list[Proposals]()
    for j in range(block.count):
        parts.append(choose(block.spread(logits(j, before)), j))
        before = parts[-1].tokens
    return Proposals.joined(parts)
