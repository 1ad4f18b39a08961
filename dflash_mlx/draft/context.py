"""The draft's memory: projected keys and values of committed positions."""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx


class LayerGroup:
    """Buffers of the layers that share a window and a projection.

    `keys` and `values` are [layers, Hkv, capacity, D]; the remembered positions lie in buffer rows
    0 .. length, in order. Without a limit that is every position. With one it is the first `sinks`
    positions and at least the last `limit - sinks`, in a buffer that does not grow. The last
    `solid` rows are of consecutive positions.
    """

    step = 256

    def __init__(
        self,
        layers: int,
        heads: int,
        dim: int,
        dtype: mx.Dtype,
        limit: int | None = None,
        sinks: int = 0,
    ):
        self.limit, self.sinks = limit, sinks
        self.length = self.solid = 0
        rows = self.step if limit is None else limit + self.step
        self.keys = mx.zeros((layers, heads, rows, dim), dtype)
        self.values = mx.zeros((layers, heads, rows, dim), dtype)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What groups of one draft have in common, whatever they hold."""
        layers, heads, _, dim = self.keys.shape
        return layers, heads, dim, self.keys.dtype, self.limit, self.sinks

    def wanted(self, rows: int) -> list[tuple[int, int]]:
        """Of the next `rows` positions, those worth appending: (start, stop) pairs in order.

        They must then be appended: what is left out ends the run of consecutive rows.
        """
        if self.limit is None:
            return [(0, rows)]
        first = min(max(self.sinks - self.length, 0), rows)
        last = max(rows - (self.limit - self.sinks), first)
        if first == last:
            return [(0, rows)]
        self.solid = -first
        return [(0, first), (last, rows)]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add rows [layers, Hkv, n, D] in place."""
        rows = keys.shape[2]
        if rows == 0:
            return
        if self.length + rows > self.keys.shape[2]:
            self._make_room(rows)
        end = self.length + rows
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        self.solid += rows

    def mark(self) -> "GroupMark":
        """Remember this moment. A limited buffer is held, and copied when it changes next."""
        if self.limit is None:
            return GroupMark(self.length, self.solid)
        return GroupMark(self.length, self.solid, copy(self.keys), copy(self.values))

    def reset(self, mark: "GroupMark") -> None:
        """Return to a moment; a group without a limit must not have been cut below it since."""
        self.length, self.solid = mark.length, mark.solid
        if mark.keys is not None and mark.values is not None:
            self.keys, self.values = copy(mark.keys), copy(mark.values)

    def fork(self, mark: "GroupMark") -> "LayerGroup":
        """Another group that stands at a moment of this one; rows are copied."""
        other = copy(self)
        other.reset(mark)
        if self.limit is None:
            other.keys = mx.contiguous(self.keys[:, :, : mark.length])
            other.values = mx.contiguous(self.values[:, :, : mark.length])
        return other

    def holds(self, offset: int, end: int) -> bool:
        """Whether a context cut from position `end` to `offset` has all that one run afresh has."""
        left = self.solid - (end - offset)
        return left >= (offset if self.limit is None else min(offset, self.limit - self.sinks))

    def cut(self, rows: int) -> None:
        """Forget the last rows."""
        self.length, self.solid = max(self.length - rows, 0), max(self.solid - rows, 0)

    def _make_room(self, rows: int) -> None:
        if self.limit is None:
            # A quarter more each time keeps the copies' sum linear in the context.
            kept, capacity = self.length, self.length + rows + max(self.step, self.length // 4)
        else:
            kept = min(self.length, self.limit)
            capacity = max(self.keys.shape[2], kept + rows)
        self.keys = self._moved(self.keys, kept, capacity)
        self.values = self._moved(self.values, kept, capacity)
        self.length = kept
        if self.limit is not None and kept > self.sinks:
            self.solid = min(self.solid, kept - self.sinks)

    def _moved(self, old: mx.array, kept: int, capacity: int) -> mx.array:
        layers, heads, _, dim = old.shape
        new = mx.zeros((layers, heads, capacity, dim), old.dtype)
        sinks = min(self.sinks, kept)
        new[:, :, :sinks] = old[:, :, :sinks]
        recent = kept - sinks
        new[:, :, sinks:kept] = old[:, :, self.length - recent : self.length]
        return new


@dataclass(frozen=True)
class GroupMark:
    """A moment of a group: its rows, and the buffers where it has a limit."""

    length: int
    solid: int
    keys: mx.array | None = None
    values: mx.array | None = None


@dataclass(frozen=True)
class ContextMark:
    """A moment of a context."""

    offset: int
    groups: tuple[GroupMark, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held besides the context's own."""
        arrays = [a for g in self.groups for a in (g.keys, g.values) if a is not None]
        return sum(a.nbytes for a in arrays)


class Context:
    """What a draft remembers of a sequence: one LayerGroup for each kind of layer.

    `offset` is the absolute position that follows the last row. Rows of a group are the latest
    positions before `offset`, and the first ones where a group keeps sinks; a context may begin
    late (after a cache that was filled without a draft) and then simply holds less.

    `before` is the token at its last position, for the one head that looks at it (XPress); None
    where it is not known.
    """

    def __init__(self, groups: list[LayerGroup]):
        self.groups = groups
        self.offset = 0
        self.before: int | None = None

    def rewind(self, offset: int) -> None:
        """Forget positions from `offset` on; a windowed group then holds what it still has."""
        for group in self.groups:
            group.cut(self.offset - offset)
        self.offset = offset

    def restart(self, offset: int) -> None:
        """Forget everything; the next rows stand at `offset`."""
        for group in self.groups:
            group.cut(group.length)
        self.offset = offset

    def renew(self) -> None:
        """Forget everything, the buffers too: a failure may have left them to be computed."""
        for group in self.groups:
            group.keys, group.values = mx.zeros_like(group.keys), mx.zeros_like(group.values)
        self.restart(0)

    def resembles(self, other: "Context") -> bool:
        """Whether both are of one draft, as far as shapes can tell."""
        return [g.kind for g in self.groups] == [g.kind for g in other.groups]

    def mark(self) -> ContextMark:
        """Remember this moment; until a return the context may only grow."""
        return ContextMark(self.offset, tuple(group.mark() for group in self.groups))

    def cut(self, offset: int) -> ContextMark:
        """What cutting to `offset` positions would leave; `holds` says whether that is enough."""
        rows, marks = self.offset - offset, [group.mark() for group in self.groups]
        shorter = (replace(m, length=m.length - rows, solid=m.solid - rows) for m in marks)
        return ContextMark(offset, tuple(shorter))

    def reset(self, mark: ContextMark) -> None:
        """Return to a moment."""
        self.offset = mark.offset
        for group, one in zip(self.groups, mark.groups, strict=True):
            group.reset(one)

    def fork(self, mark: ContextMark) -> "Context":
        """Another context that stands at a moment of this one; rows are copied."""
        pairs = zip(self.groups, mark.groups, strict=True)
        other = Context([group.fork(one) for group, one in pairs])
        other.offset = mark.offset
        return other

    def holds(self, offset: int) -> bool:
        """Whether cut to `offset` positions it has all that a context run afresh has."""
        return all(group.holds(offset, self.offset) for group in self.groups)

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers, for evaluation."""
        return [array for group in self.groups for array in (group.keys, group.values)]

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(array.nbytes for array in self.arrays)
