"""Tokens on their way from a forward to the caller."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from dflash_mlx.decode.acceptance import read


@dataclass
class Token:
    """One emitted token; `logprobs` [V] is what it was chosen from, before the sampler."""

    id: int
    logprobs: mx.array
    from_draft: bool


@dataclass
class Emission:
    """What one forward of the target yields, held while the device is given its next work.

    Attributes:
        tokens: [1] and unread after a plain forward; a list of ids after a verify.
        logprobs: [>= len(tokens), V].
        accepted: how many of the tokens were proposals; they come first.
        proposed: how many proposals were verified.
        forwards: what the forward counts for; 0 for the prefill's.
        drafted: proposals drafted in the cycle; 0 for a plain one.
        context: tokens in the target's cache when the forward began.
        confidence: of all proposals drafted, [>= proposed], where the draft says.
        read: whether the host read the confidence before it queued the verify.
        forced: whether a guide put proposals of its own in, which tell nothing about the draft.
    """

    tokens: mx.array | list[int]
    logprobs: mx.array
    accepted: int = 0
    proposed: int = 0
    forwards: int = 1
    drafted: int = 0
    context: int = 0
    confidence: mx.array | None = None
    read: bool = False
    forced: bool = False

    @property
    def known(self) -> list[int] | None:
        """The ids, unless reading them would wait for the device."""
        return self.tokens if isinstance(self.tokens, list) else None

    @property
    def last(self) -> mx.array:
        """The anchor of the next block, [1]."""
        return mx.array(self.tokens[-1:]) if isinstance(self.tokens, list) else self.tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Token]:
        ids = self.tokens if isinstance(self.tokens, list) else read(self.tokens)
        for i, token in enumerate(ids):
            yield Token(token, self.logprobs[i], i < self.accepted)
