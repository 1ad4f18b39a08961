"""What a draft hands to the verify: token ids and the distribution they were drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


@dataclass
class Proposals:
    """The proposals of one block, all lazy.

    Attributes:
        tokens: [m] token ids.
        q: [m, V] probabilities that `tokens` were really sampled from, float32; None when each
            token was chosen outright (one-hot q).
        support: [m, k] token ids that the columns of `q` stand for when q is sparse; None when
            column v of `q` is token v.
        confidence: [m] how likely the draft thinks each token is to be accepted if those before it
            were, 0 … 1, for the choice of the verify length: of its confidence head, after the
            sigmoid, or else what it gives the token itself. None when it does not say.
    """

    tokens: mx.array
    q: mx.array | None = None
    support: mx.array | None = None
    confidence: mx.array | None = None

    def first(self, m: int) -> "Proposals":
        """The first m of them."""
        if m == self.tokens.size:
            return self
        return Proposals(
            self.tokens[:m],
            None if self.q is None else self.q[:m],
            None if self.support is None else self.support[:m],
            None if self.confidence is None else self.confidence[:m],
        )

    @classmethod
    def joined(cls, parts: Sequence["Proposals"]) -> "Proposals":
        """Blocks one after the other as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            mx.concatenate([part.tokens for part in parts]),
            *(
                _joined([getattr(part, name) for part in parts])
                for name in ("q", "support", "confidence")
            ),
        )


def _joined(arrays: Sequence[mx.array | None]) -> mx.array | None:
    known = [array for array in arrays if array is not None]
    return mx.concatenate(known) if len(known) == len(arrays) else None


class Choice(Protocol):
    """How tokens are taken from a draft's logits.

    `temperature` is 0 where the likeliest are wanted; a draft that scores candidates itself
    (DFlash 2) needs no more than that.
    """

    temperature: float

    def __call__(self, logits: mx.array) -> Proposals:
        """Logits [m, V] -> m proposals, each row on its own."""
        ...
