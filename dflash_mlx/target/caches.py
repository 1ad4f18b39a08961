"""How each kind of mlx-lm cache goes back to the first tokens of a verify.

A cache is the list that `mlx_lm.models.cache.make_prompt_cache` returns; its leaves are the
entries with every `CacheList` opened. A rule marks a leaf before the verify forward and takes it
back afterwards. Nothing here evaluates an array.
"""

from collections.abc import Iterable
from copy import copy
from typing import Any, Generic, TypeVar

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from dflash_mlx.errors import UnsupportedTarget
from dflash_mlx.target.leaf import Chunks, Counting, Leaf, Slots, Window, leaves

L = TypeVar("L", bound=Leaf)
C = TypeVar("C", bound=Counting)


def alias(value: Any) -> Any:
    """A copy of nested containers whose arrays are new handles on the same data.

    In-place updates rebind a handle, so the aliases keep the values of this moment.
    """
    if isinstance(value, mx.array):
        return copy(value)
    if isinstance(value, (list, tuple)):
        return type(value)(alias(v) for v in value)
    if isinstance(value, dict):
        return {k: alias(v) for k, v in value.items()}
    return value


class Rule(Generic[L]):
    """One way back, of leaves of a kind. `mark` is what `commit` or `reset` will need."""

    name = ""
    replays = False  # needs its mixer or the whole target to run again

    def mark(self, leaf: L, resettable: bool) -> Any:
        """Remember the leaf as it is.

        Args:
            resettable: whether well enough to return to exactly this.
        """
        raise NotImplementedError

    def commit(self, leaf: L, mark: Any, rows: int, kept: int) -> None:
        """Keep the first `kept` of `rows` tokens appended since the mark, 1 <= kept < rows."""
        raise NotImplementedError

    def reset(self, leaf: L, mark: Any) -> None:
        """Return to the mark, which was made resettable."""
        raise NotImplementedError


class Offset(Rule[C]):
    """Rows are appended in order: move the offset back.

    The mark is a number. A reference to the buffers would make the next in-place update copy
    them whole.
    """

    name = "offset"

    def mark(self, leaf: C, resettable: bool) -> Any:
        return leaf.offset

    def commit(self, leaf: C, mark: Any, rows: int, kept: int) -> None:
        # A cache that the target did not use in this forward has not moved.
        if leaf.offset != mark:
            leaf.offset = mark + kept

    def reset(self, leaf: C, mark: Any) -> None:
        leaf.offset = mark


class Chunked(Offset[Chunks]):
    """Like Offset; but rows before the current chunk are dropped from the front for good."""

    def mark(self, leaf: Chunks, resettable: bool) -> Any:
        if resettable:
            return leaf.offset, leaf.start_position, alias(leaf.keys), alias(leaf.values)
        return leaf.offset

    def reset(self, leaf: Chunks, mark: Any) -> None:
        leaf.offset, leaf.start_position, leaf.keys, leaf.values = mark


class Rows(Offset[Counting]):
    """Rows are concatenated: drop the last ones."""

    name = "rows"

    def commit(self, leaf: Counting, mark: Any, rows: int, kept: int) -> None:
        if leaf.offset != mark:
            self.reset(leaf, mark + kept)

    def reset(self, leaf: Counting, mark: Any) -> None:
        leaf.offset = mark
        if mark == 0:
            leaf.keys = leaf.values = None
        else:
            leaf.keys, leaf.values = leaf.keys[..., :mark, :], leaf.values[..., :mark, :]


class Ring(Rule[Window]):
    """A rotating window.

    Several tokens at once leave it in temporal order, with the max_size - 1 rows before them
    still there, so dropping the newest rows loses nothing even when it is full. One token alone
    overwrites the oldest row, but then there is nothing to drop.
    """

    name = "ring order"

    def mark(self, leaf: Window, resettable: bool) -> Any:
        if leaf.keep:
            raise UnsupportedTarget(
                f"This cache keeps its first {leaf.keep} tokens in a rotating window of "
                f"{leaf.max_size} (max_kv_size), and mlx-lm hides those tokens when several are "
                "processed at once, so the text would be wrong; leave max_kv_size out."
            )
        if resettable:
            return leaf.offset, leaf._idx, alias(leaf.keys), alias(leaf.values)
        return leaf.offset

    def commit(self, leaf: Window, mark: Any, rows: int, kept: int) -> None:
        dropped = rows - kept
        if leaf.offset == mark:
            return
        leaf.keys = leaf.keys[..., :-dropped, :]
        leaf.values = leaf.values[..., :-dropped, :]
        leaf.offset -= dropped
        leaf._idx -= dropped

    def reset(self, leaf: Window, mark: Any) -> None:
        leaf.offset, leaf._idx, leaf.keys, leaf.values = mark


class State(Rule[Slots]):
    """Slots of recurrent state: put the old ones back; the mixer then runs the kept rows."""

    name = "state replay"
    replays = True

    def mark(self, leaf: Slots, resettable: bool) -> Any:
        # Models rebind slots, so the old arrays stay as they are; the lengths are counted down
        # in place.
        return list(leaf.cache), alias(leaf.lengths), alias(leaf.left_padding)

    def reset(self, leaf: Slots, mark: Any) -> None:
        slots, leaf.lengths, leaf.left_padding = mark
        leaf.cache[:] = slots


class Unknown(Rule[Leaf]):
    """A class nobody described: remember all its attributes and run the target again."""

    name = "full replay"
    replays = True

    def mark(self, leaf: Leaf, resettable: bool) -> Any:
        return {k: alias(v) for k, v in vars(leaf).items()}

    def reset(self, leaf: Leaf, mark: Any) -> None:
        vars(leaf).clear()
        vars(leaf).update(mark)


OFFSET, CHUNKED, ROWS, RING = Offset[Counting](), Chunked(), Rows(), Ring()
STATE, UNKNOWN = State(), Unknown()
# Their leaves have an `offset`, the number of tokens they have seen.
COUNTING = (OFFSET, CHUNKED, ROWS, RING)

# Exact classes: a subclass may do anything.
RULES: dict[type, Rule[Any]] = {
    mlx_cache.KVCache: OFFSET,
    mlx_cache.QuantizedKVCache: OFFSET,
    mlx_cache.ChunkedKVCache: CHUNKED,
    mlx_cache.ConcatenateKVCache: ROWS,
    mlx_cache.RotatingKVCache: RING,
    mlx_cache.ArraysCache: STATE,
}


def rule_of(leaf: Leaf) -> Rule[Any]:
    """The rule of a cache leaf, by its exact class."""
    return RULES.get(type(leaf), UNKNOWN)


def rolls_back_by(leaf: Leaf) -> str:
    """How a leaf of this class goes back, in two words, when its target allows it.

    A target whose mixers cannot be replayed alone is replayed whole: `TargetView.rolls_back_by`
    knows.
    """
    return rule_of(leaf).name


def rows_of(cache: Iterable[Leaf]) -> list[tuple[Leaf, int, int | None]]:
    """Each leaf with the rows that its buffers have room for now, and the most that stay.

    No rows where they do not grow with the sequence, or nobody knows how; no most where they grow
    without end.
    """
    found: list[tuple[Leaf, int, int | None]] = []
    for leaf in leaves(cache):
        rule, keys = rule_of(leaf), getattr(leaf, "keys", None)
        if rule not in (OFFSET, ROWS, CHUNKED, RING) or keys is None:
            found.append((leaf, 0, None))
            continue
        rows = (keys if isinstance(keys, mx.array) else keys[0]).shape[-2]
        most = {RING: "max_size", CHUNKED: "chunk_size"}.get(rule)
        found.append((leaf, rows, None if most is None else getattr(leaf, most)))
    return found
