"""What a draft hands to the verify: token ids and the distribution they were drawn from."""

from dataclasses import dataclass

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
    """

    tokens: mx.array
    q: mx.array | None = None
    support: mx.array | None = None
