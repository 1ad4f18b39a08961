"""The draft's memory: projected keys and values of committed positions."""

from typing import Any

import mlx.core as mx


class LayerGroup:
    """Buffers of the layers that share a window and a projection.

    `keys` and `values` are [layers, Hkv, capacity, D]; the remembered positions lie in buffer rows
    0 .. length, in order. Without a limit that is every position. With one it is the first `sinks`
    positions and at least the last `limit - sinks`, in a buffer that does not grow.
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
        self.length = 0
        rows = self.step if limit is None else limit + self.step
        self.keys = mx.zeros((layers, heads, rows, dim), dtype)
        self.values = mx.zeros((layers, heads, rows, dim), dtype)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What groups of one draft have in common, whatever they hold."""
        layers, heads, _, dim = self.keys.shape
        return layers, heads, dim, self.keys.dtype, self.limit, self.sinks

    def wanted(self, rows: int) -> list[tuple[int, int]]:
        """Of the next `rows` positions, those worth appending: (start, stop) pairs in order."""
        if self.limit is None:
            return [(0, rows)]
        first = min(max(self.sinks - self.length, 0), rows)
        last = max(rows - (self.limit - self.sinks), first)
        return [(0, rows)] if first == last else [(0, first), (last, rows)]

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

    def reserve(self, rows: int) -> None:
        """Make room for so many more rows at once, rather than bit by bit."""
        if self.limit is None and self.length + rows > self.keys.shape[2]:
            self._make_room(rows)

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

    def _moved(self, old: mx.array, kept: int, capacity: int) -> mx.array:
        layers, heads, _, dim = old.shape
        new = mx.zeros((layers, heads, capacity, dim), old.dtype)
        sinks = min(self.sinks, kept)
        new[:, :, :sinks] = old[:, :, :sinks]
        recent = kept - sinks
        new[:, :, sinks:kept] = old[:, :, self.length - recent : self.length]
        return new


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
            group.length = max(0, group.length - (self.offset - offset))
        self.offset = offset

    def restart(self, offset: int) -> None:
        """Forget everything; the next rows stand at `offset`."""
        for group in self.groups:
            group.length = 0
        self.offset = offset

    def resembles(self, other: "Context") -> bool:
        """Whether both are of one draft, as far as shapes can tell."""
        return [g.kind for g in self.groups] == [g.kind for g in other.groups]

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers, for evaluation."""
        return [array for group in self.groups for array in (group.keys, group.values)]

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(array.nbytes for array in self.arrays)
