"""DSpark's confidence: how likely each proposal is to be accepted if those before it were."""

import mlx.core as mx
import mlx.nn as nn


class ConfidenceHead(nn.Module):
    """sigmoid(C [h; e] + b), e the chain's embedding of the token before, where it takes part."""

    def __init__(self, dim: int, rank: int):
        """`rank` is the width of e; 0 leaves it out."""
        super().__init__()
        self.with_markov = rank > 0
        self.proj = nn.Linear(dim + rank, 1)

    def __call__(self, hidden: mx.array, embedded: mx.array | None) -> mx.array:
        """Hidden states [n, H] and embeddings [n, r] -> [n] in 0 … 1, float32, after the sigmoid.

        The bias is applied as it is published: what comes out is the chance itself.
        """
        x = hidden
        if self.with_markov and embedded is not None:
            x = mx.concatenate([hidden, embedded.astype(hidden.dtype)], axis=-1)
        return mx.sigmoid(self.proj(x)[:, 0].astype(mx.float32))
