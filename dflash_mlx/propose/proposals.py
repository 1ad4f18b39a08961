"""What is handed to the verify: token ids, and how sure their maker is of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from dflash_mlx.propose.tree import Tree


@dataclass
class Proposals:
    """The proposals of one cycle, lazy but for their tree.

    Attributes:
        tokens: [m] token ids.
        confidence: [m] how likely the draft thinks each token is to be accepted if those before it
            were, 0 … 1, for the choice of the verify length: of its confidence head, after the
            sigmoid, or else what it gives the token itself. None when it does not say.
        tree: how they hang together; None for a line, each token behind the one before it.
        likelihood: [m] what the draft gives each token itself, where the confidence is a head's.
    """

    tokens: mx.array
    confidence: mx.array | None = None
    tree: Tree | None = None
    likelihood: mx.array | None = None

    @cached_property
    def signs(self) -> mx.array | None:
        """What a policy reads: the confidences [m], or [m, 2] with the likelihoods beside them."""
        if self.confidence is None or self.likelihood is None:
            return self.confidence
        return mx.stack([self.confidence, self.likelihood.astype(mx.float32)], axis=-1)

    def first(self, m: int) -> "Proposals":
        """The first m of them."""
        if m == self.tokens.size:
            return self
        tree = None if self.tree is None else self.tree.first(m)
        return Proposals(
            self.tokens[:m],
            None if self.confidence is None else self.confidence[:m],
            tree if tree is not None and tree.branches else None,
            None if self.likelihood is None else self.likelihood[:m],
        )

    @classmethod
    def joined(cls, parts: Sequence["Proposals"]) -> "Proposals":
        """Lines one after the other as one."""
        if len(parts) == 1:
            return parts[0]
        said = [part.confidence for part in parts if part.confidence is not None]
        return cls(
            mx.concatenate([part.tokens for part in parts]),
            mx.concatenate(said) if len(said) == len(parts) else None,
        )

    @classmethod
    def of(cls, tree: Tree) -> "Proposals":
        """A tree's; a line where it has no branches."""
        return cls(mx.array(tree.tokens, mx.int32), None, tree if tree.branches else None)
