"""Take a whole prompt cache back to a shorter prefix, for chats that edit or fork their history.

Caches that keep every row can be cut anywhere (`can_rewind`, `rewind`). The others return only to
a moment that was remembered (`snapshot`, `restore`).
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from dflash_mlx.errors import InvalidCache
from dflash_mlx.target.caches import CHUNKED, OFFSET, RING, ROWS, STATE, Rule, alias, rule_of
from dflash_mlx.target.leaf import Chunks, Counting, Leaf, Window, leaves


def can_rewind(cache: list[Leaf], n_tokens: int | None = None) -> bool:
    """Whether `rewind(cache, n_tokens)` would be exact; without n_tokens: for every prefix.

    Never for recurrent state or an unknown class, and for a window only while it still holds the
    rows that the shorter prefix needs.
    """
    return all(_holds(leaf, n_tokens) for leaf in leaves(cache))


def rewind(cache: list[Leaf], n_tokens: int) -> None:
    """Leave exactly the first n_tokens tokens in the cache.

    Raises:
        InvalidCache: that cannot be exact; the cache is as it was.
    """
    found = leaves(cache)
    if not all(_holds(leaf, n_tokens) for leaf in found):
        raise InvalidCache(
            f"This prompt cache no longer holds what its first {n_tokens} tokens left behind; "
            "start from a new cache or an earlier snapshot."
        )
    for leaf in found:
        if rule_of(leaf) is RING:
            _cut_ring(cast(Window, leaf), n_tokens)
        elif rule_of(leaf) is ROWS:
            ROWS.reset(cast(Counting, leaf), n_tokens)
        else:
            cast(Counting, leaf).offset = n_tokens


def _holds(leaf: Leaf, n_tokens: int | None) -> bool:
    rule = rule_of(leaf)
    if rule.replays:
        return False
    offset = cast(Counting, leaf).offset
    if n_tokens is None:
        n_tokens = min(1, offset)
    if rule in (OFFSET, ROWS):
        return 0 <= n_tokens <= offset
    if rule is CHUNKED:
        chunks = cast(Chunks, leaf)
        chunk_start = n_tokens // chunks.chunk_size * chunks.chunk_size
        return chunks.start_position <= chunk_start and n_tokens <= offset
    return _ring_holds(cast(Window, leaf), n_tokens)


def _ring_holds(leaf: Window, n_tokens: int) -> bool:
    if leaf.offset > leaf.max_size and (leaf.keep or leaf._idx != leaf.keys.shape[2]):
        return False  # the oldest rows are not first in the buffer
    left = leaf._idx - (leaf.offset - n_tokens)
    return min(n_tokens, leaf.max_size) <= left <= leaf._idx


def _cut_ring(leaf: Window, n_tokens: int) -> None:
    left = leaf._idx - (leaf.offset - n_tokens)
    leaf.keys = leaf.keys[..., :left, :] if left else None
    leaf.values = leaf.values[..., :left, :] if left else None
    leaf.offset, leaf._idx = n_tokens, left


@dataclass
class Snapshot:
    """A moment of a prompt cache; it can be restored any number of times.

    Rows of an ordinary KV cache are not held, only their number. Windows and recurrent state are
    held as they are, so each costs one copy at its first change after the snapshot and the memory
    of that copy while the snapshot lives.
    """

    marks: list[tuple[Rule[Any], type, Any]]

    @property
    def nbytes(self) -> int:
        """Bytes held besides the cache's own, once it has changed."""
        return sum(_nbytes(mark) for _, _, mark in self.marks)


def snapshot(cache: list[Leaf]) -> Snapshot:
    """Remember this moment; afterwards the cache may only be extended or taken back to it."""
    return Snapshot(
        [(rule_of(leaf), type(leaf), rule_of(leaf).mark(leaf, True)) for leaf in leaves(cache)]
    )


def restore(cache: list[Leaf], moment: Snapshot) -> None:
    """Return the cache to a snapshot of it.

    Raises:
        InvalidCache: the cache was quantized or cut since; it is as it was.
    """
    found = leaves(cache)
    _check(found, moment)
    for leaf, (rule, _, mark) in zip(found, moment.marks, strict=True):
        # Handles of their own: the cache will change them, the snapshot must not.
        rule.reset(leaf, alias(mark))


def keeps_rows(cache: list[Leaf]) -> bool:
    """Whether every leaf keeps all rows, so that it can be cut anywhere."""
    return all(rule_of(leaf) in (OFFSET, ROWS) for leaf in leaves(cache))


def cut(cache: list[Leaf], n_tokens: int) -> Snapshot:
    """The moment at which a cache that keeps every row had n_tokens tokens.

    Raises:
        InvalidCache: it is another cache, or never had so many.
    """
    found = leaves(cache)
    if not keeps_rows(cache) or not all(_holds(leaf, n_tokens) for leaf in found):
        raise InvalidCache(f"This prompt cache cannot be cut to {n_tokens} tokens.")
    return Snapshot([(rule_of(leaf), type(leaf), n_tokens) for leaf in found])


def fork(cache: list[Leaf], moment: Snapshot) -> list[Leaf]:
    """Another cache that stands at a moment of this one, which may go on meanwhile.

    Rows are copied, not shared: a cache of which somebody else holds a handle would be copied whole
    by its next update. Nothing is evaluated yet.

    Raises:
        InvalidCache: where `restore` would.
    """
    _check(leaves(cache), moment)
    marks = iter(moment.marks)
    return [_forked(c, marks) for c in cache]


def _forked(c: Any, marks: Iterator[tuple[Rule[Any], type, Any]]) -> Any:
    other = copy(c)
    if type(c) is CacheList:
        other.caches = tuple(_forked(inner, marks) for inner in c.caches)
        return other
    rule, _, mark = next(marks)
    if rule in (OFFSET, ROWS):
        other.offset = mark
        other.keys, other.values = _rows(c.keys, mark), _rows(c.values, mark)
    else:
        if rule is STATE:
            other.cache = list(c.cache)
        rule.reset(other, alias(mark))
    return other


def _rows(buffer: Any, count: int) -> Any:
    """The first rows of keys or values, on their own; a quantized buffer is a tuple of arrays."""
    if not count or buffer is None:
        return None
    if isinstance(buffer, mx.array):
        return mx.contiguous(buffer[..., :count, :])
    return type(buffer)(_rows(part, count) for part in buffer)


def _nbytes(value: Any) -> int:
    if isinstance(value, mx.array):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(_nbytes(v) for v in value)


def _check(found: list[Leaf], moment: Snapshot) -> None:
    if [type(leaf) for leaf in found] != [cls for _, cls, _ in moment.marks]:
        raise InvalidCache(
            "This prompt cache has changed its kind since the snapshot (it was quantized, or is "
            "another model's); start from a new cache."
        )
    for leaf, (rule, _, mark) in zip(found, moment.marks, strict=True):
        if rule in (OFFSET, ROWS) and cast(Counting, leaf).offset < mark:
            raise InvalidCache(
                "This prompt cache was cut to less than what the snapshot stands for; "
                "start from a new cache."
            )
