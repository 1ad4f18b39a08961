"""The ranks of a group, and what rank 0 tells the others."""

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream

from dflash_mlx.errors import DFlashError


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

    def told_list(self, values: Sequence[int], source: int = 0) -> list[int]:
        """As `told`, of rank 0's length; what the others give is not looked at."""
        (size,) = self.told([len(values)], source)
        own = values if self.rank == source else [0] * size
        return self.told(own, source) if size else []

    def told_text(self, text: str, source: int = 0) -> str:
        """A rank's text, in every rank."""
        return bytes(self.told_list(text.encode(), source)).decode()

    def decided(self, call: Callable[[], Any]) -> Any:
        """What a call gives in rank 0, where alone it is made, in every rank.

        Args:
            call: gives what JSON can hold.

        Raises:
            DFlashError: the call raised it.
        """
        found, failed = None, None
        if self.leads:
            try:
                found = call()
            except DFlashError as error:
                failed = error
        told = self.told_text(json.dumps([found, None if failed is None else str(failed)]))
        found, complaint = json.loads(told)
        if complaint is not None:
            raise failed or DFlashError(complaint)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the ranks, in every rank."""
        return bool(self.failures(flag))

    def failures(self, failed: bool) -> list[int]:
        """The ranks in which something failed, in every rank."""
        flags = [int(failed and rank == self.rank) for rank in range(self.size)]
        with mx.stream(generation_stream):
            total = mx.distributed.all_sum(mx.array(flags, mx.int32), group=self.group)
            return [rank for rank, flag in enumerate(cast(list[int], total.tolist())) if flag]
