"""What the caches of mlx-lm have in common, and what those of one kind have."""

from collections.abc import Iterable
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx_lm.models.cache import CacheList


class Leaf(Protocol):
    """A layer's cache, of whatever class."""

    @property
    def state(self) -> Any:
        """Its arrays, nested."""

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""


class Counting(Leaf, Protocol):
    """Keeps keys and values [B, Hkv, S, D] of tokens, and counts them.

    Attributes:
        offset: tokens seen.
        keys, values: None before the first; quantized, each is a tuple of arrays.
    """

    offset: int
    keys: Any
    values: Any


class Chunks(Counting, Protocol):
    """Drops from the front whatever is of an earlier chunk.

    Attributes:
        start_position: the position of the first row that is left.
        chunk_size: positions of a chunk.
    """

    start_position: int
    chunk_size: int


class Window(Counting, Protocol):
    """Keeps the last tokens, in a buffer that is written round and round.

    Attributes:
        max_size: rows that stay.
        keep: of them, first tokens that are never overwritten.
        _idx: where the next row goes.
    """

    max_size: int
    keep: int
    _idx: int


class Slots(Leaf, Protocol):
    """Recurrent state.

    Attributes:
        cache: arrays, or None before the first token.
        lengths, left_padding: of a batch's rows; None for one.
    """

    cache: list[mx.array | None]
    lengths: mx.array | None
    left_padding: mx.array | None


def leaves(cache: Iterable[Leaf]) -> list[Leaf]:
    """The caches inside a prompt cache, with every CacheList opened."""
    found: list[Leaf] = []
    for c in cache:
        if type(c) is CacheList:
            found.extend(leaves(cast(Any, c).caches))
        else:
            found.append(c)
    return found
