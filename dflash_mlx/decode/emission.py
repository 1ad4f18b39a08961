"""Tokens on their way from a forward of the target to the caller.

What a forward yields is held while the device is given its next work: of a plain forward `Unread`,
of a verify `Judged`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from dflash_mlx.decode.acceptance import Verdict
from dflash_mlx.decode.device import read
from dflash_mlx.propose import Tree


@dataclass
class Token:
    """One emitted token; `logprobs` [V] is what it was chosen from, before the sampler."""

    id: int
    logprobs: mx.array
    from_draft: bool


@dataclass(frozen=True)
class Drafting:
    """What a cycle drafted before its forward of the target, if anything.

    Attributes:
        count: proposals drafted; 0 in a cycle without a draft's forward.
        signs: of the proposals, where there are any.
        awaited: whether the host waited for them before it queued the verify.
        copied: whether the proposals were copied from the text instead.
        tree: of a cycle that grew one, what it wants verified of it.
    """

    count: int = 0
    signs: mx.array | None = None
    awaited: bool = False
    copied: bool = False
    tree: Tree | None = None


NOTHING_DRAFTED, COPIED = Drafting(), Drafting(copied=True)


@dataclass(frozen=True)
class Unread:
    """A plain forward's token, which the device may still be computing.

    Attributes:
        token: [1].
        logprobs: [1, V].
        context: tokens in the target's cache when the forward began.
        drafting: what was drafted, if only to verify nothing of it.
        prefill: whether the forward is the one that ends a prompt.
    """

    token: mx.array
    logprobs: mx.array
    context: int
    drafting: Drafting = NOTHING_DRAFTED
    prefill: bool = False

    known: ClassVar[None] = None
    proposed: ClassVar[int] = 0
    accepted: ClassVar[int] = 0
    forced: ClassVar[bool] = False

    @property
    def anchor(self) -> mx.array:
        """The anchor of the next block, [1]."""
        return self.token

    def __len__(self) -> int:
        return 1

    def tokens(self) -> Iterator[Token]:
        """The token; waits for the device."""
        yield Token(read(self.token)[0], self.logprobs[0], from_draft=False)


@dataclass(frozen=True)
class Judged:
    """What a verify decided.

    Attributes:
        verdict: its tokens.
        proposed: how many proposals were verified.
        context, drafting: as in `Unread`.
        forced: whether a guide put proposals of its own in, which tell nothing about the draft.
    """

    verdict: Verdict
    proposed: int
    context: int
    drafting: Drafting
    forced: bool

    prefill: ClassVar[bool] = False

    @property
    def known(self) -> list[int]:
        """The ids."""
        return self.verdict.tokens

    @property
    def accepted(self) -> int:
        """How many of the tokens were proposals; they come first."""
        return self.verdict.accepted

    @property
    def anchor(self) -> mx.array:
        """The anchor of the next block, [1]."""
        return mx.array(self.known[-1:])

    def __len__(self) -> int:
        return len(self.known)

    def tokens(self) -> Iterator[Token]:
        """The accepted proposals and the bonus token."""
        for i, token in enumerate(self.known):
            yield Token(token, self.verdict.logprobs[i], i < self.accepted)


Emission = Unread | Judged
