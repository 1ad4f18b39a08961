"""Texts that have to look like something: which tokens are allowed, row by row."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx


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
