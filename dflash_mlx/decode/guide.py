"""Texts that have to look like something: which tokens are allowed, row by row."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.decode.device import DeviceWork, queue, read
from dflash_mlx.decode.phases import phase
from dflash_mlx.propose import Proposals


class Guide(Protocol):
    """Rules what may come next in one text, as the text goes on.

    The host asks it while the device runs the forward whose rows it rules.
    """

    def follow(self, text: Sequence[int]) -> None:
        """Take the text as it is now: all tokens behind the prompt, a longer one every time."""
        ...

    def revise(self, proposed: Sequence[int], most: int) -> tuple[list[int], bool]:
        """What is worth proposing behind the text, at most so many tokens.

        Returns:
            Tokens that are allowed one after the other: those that must come, whatever is
            proposed, and then the proposals up to the first that is not allowed; and whether some
            had to come.
        """
        ...

    def allowed(self, proposed: Sequence[int]) -> mx.array | None:
        """The tokens allowed behind the text and behind each proposal.

        Args:
            proposed: m tokens from `revise`.

        Returns:
            Bits [m + 1, ceil(V / 32)] uint32, the lowest for the first token; None: all of them.
        """
        ...


def restrict(logits: mx.array, bits: mx.array | None) -> mx.array:
    """Logits [n, V] with those of tokens that are not allowed at minus infinity.

    Args:
        bits: from `Guide.allowed`, [n, ceil(V / 32)].
    """
    if bits is None:
        return logits
    places = mx.arange(32, dtype=mx.uint32)
    allowed = (bits[:, :, None] >> places) & 1
    allowed = allowed.reshape(bits.shape[0], -1)[:, : logits.shape[-1]]
    return mx.where(allowed.astype(mx.bool_), logits, mx.array(-mx.inf, logits.dtype))


class Guided:
    """One generation under a guide, or under none, which then leaves everything as it is."""

    def __init__(self, guide: Guide | None, cache: PromptCache):
        self._guide, self._cache = guide, cache
        self._start = len(cache.tokens)

    def __bool__(self) -> bool:
        return self._guide is not None

    def begin(self) -> None:
        """What the cache stands for now is the prompt; the text follows."""
        self._start = len(self._cache.tokens)

    @phase("guide")
    def revise(self, proposals: Proposals, most: int) -> tuple[Proposals, bool]:
        """Proposals as the guide wants them, and whether it put some of its own in.

        Args:
            most: how many it may want.
        """
        if self._guide is None:
            return proposals, False
        self._follow(self._guide)
        with DeviceWork(self._cache):
            proposed = read(proposals.tokens)
        tokens, forced = self._guide.revise(proposed, most)
        return Proposals(mx.array(tokens, mx.int32)), forced

    @phase("guide")
    def restrict(self, logits: mx.array, proposals: Proposals | None = None) -> mx.array:
        """Logits without what the guide does not allow.

        Args:
            logits: [m + 1, V], being computed.
            proposals: m, from `revise`; None: none.
        """
        if self._guide is None:
            return logits
        queue(logits)
        self._follow(self._guide)
        proposed = read(proposals.tokens) if proposals else []
        return restrict(logits, self._guide.allowed(proposed))

    def _follow(self, guide: Guide) -> None:
        guide.follow(self._cache.tokens[self._start :])
