"""The ranks of a group, and what rank 0 tells the others."""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
from mlx_lm.generate import generation_stream


class Ranks:
    """The processes that run one model together.

    Attributes:
        group: MLX's.
        rank: which of them this one is. Rank 0 decides, and talks to the user.
        size: how many there are.
    """

    def __init__(self, group: mx.distributed.Group):
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shared(self, tokens: mx.array, source: int = 0) -> mx.array:
        """Rank 0's token ids [n], in every rank, as int32; queued, not waited for."""
        own = tokens.astype(mx.int32)
        said = own if self.rank == source else mx.zeros_like(own)
        return mx.distributed.all_sum(said, group=self.group)

    def told(self, values: Sequence[int], source: int = 0) -> list[int]:
        """Rank 0's integers, 0 … 2^31 - 1, in every rank; as many are given everywhere.

        The other ranks wait until rank 0, or another source, says them.
        """
        # The model's collectives run on this stream, too: their order is the same in all ranks.
        with mx.stream(generation_stream):
            said = self.shared(mx.array(list(values), mx.int32), source)
            return cast(list[int], said.tolist())

    def told_text(self, text: str, source: int) -> str:
        """A rank's text, in every rank."""
        said = text.encode() if self.rank == source else b""
        (size,) = self.told([len(said)], source)
        return bytes(self.told(said or bytes(size), source)).decode() if size else ""

    def failures(self, failed: bool) -> list[int]:
        """The ranks in which something failed, in every rank."""
        flags = [int(failed and rank == self.rank) for rank in range(self.size)]
        with mx.stream(generation_stream):
            total = mx.distributed.all_sum(mx.array(flags, mx.int32), group=self.group)
            return [rank for rank, flag in enumerate(cast(list[int], total.tolist())) if flag]
