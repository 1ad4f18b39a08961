"""One forward over a tree of tokens, through the target's own code.

A row of a tree stands at the position of its depth and sees the context, its ancestors and itself.
While the forward runs, the caches that the layers are given make that mask, and the modules that
turn rows by their positions are given each row as a sequence of its own. Afterwards nothing of
either is left. Which targets this is exact for is found out by a trial.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache

from dflash_mlx.propose import Tree
from dflash_mlx.target.caches import OFFSET, RING, ROWS, rule_of
from dflash_mlx.target.leaf import Leaf
from dflash_mlx.target.watch import Handler, is_callable

# Exact classes, whose rows are all alike and lie in their order.
_KINDS = (
    mlx_cache.KVCache,
    mlx_cache.QuantizedKVCache,
    mlx_cache.ConcatenateKVCache,
    mlx_cache.RotatingKVCache,
)


def can_branch(cache: Sequence[Leaf]) -> bool:
    """Whether these caches can go back to one path of a tree."""
    return all(type(leaf) in _KINDS and not getattr(leaf, "keep", 0) for leaf in cache)


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules without parts of their own that are called with rows and an offset."""
    found = {id(m): m for m in model.modules() if is_callable(m) and not m.children()}
    return [m for m in found.values() if _takes_offset(type(m))]


def _takes_offset(cls: type) -> bool:
    try:
        names = list(inspect.signature(cls.__call__).parameters)
    except (TypeError, ValueError):
        return False
    return names[2:3] == ["offset"]


class Branches:
    """The rows of one tree in a cache: to be entered for the forward, then to be kept in part."""

    def __init__(
        self, tree: Tree, cache: Sequence[Leaf], ropes: Sequence[nn.Module], *, lie: int = 0
    ):
        """Prepare for a forward of the anchor and the tree's nodes, in their order.

        Args:
            tree: its nodes.
            cache: for which `can_branch` holds.
            ropes: the target's `rotary_modules`.
            lie: what the caches' offsets shall be too large by while the target reads them.
        """
        self._depths = [0, *tree.depths]
        self._rows, self._ropes, self._lie = len(self._depths), ropes, lie
        self._leaves = [_Leaf(leaf, self) for leaf in cache]
        self._ancestors = mx.array(tree.ancestors())
        self._depth = mx.array(self._depths)
        self._masks: dict[tuple[int, int | None], mx.array] = {}

    def __enter__(self) -> Branches:
        for leaf in self._leaves:
            leaf.open(self._lie)
        return self

    def __exit__(self, *_: object) -> None:
        for leaf in self._leaves:
            leaf.close(self._lie)

    def handlers(self) -> list[tuple[nn.Module, Handler]]:
        """What to watch during the forward."""
        start = self._leaves[0].start
        if not self._ropes:
            return []
        return [(rope, _turning(self._rows, start + self._depth)) for rope in self._ropes]

    def mask(self, context: int, window: int | None) -> mx.array:
        """What each row sees of the last `context` rows before the tree and of the tree itself.

        Args:
            context: rows that the cache gives beside the tree's.
            window: positions that a row sees, its own included; None for all.

        Returns:
            [rows, context + rows], boolean.
        """
        found = self._masks.get((context, window))
        if found is None:
            before = mx.full((self._rows, context), True)
            tree = self._ancestors
            if window is not None:
                # A row of depth 0 stands one behind the last row of the context.
                distance = self._depth[:, None] + mx.arange(context, 0, -1)
                before = distance < window
                tree = tree & (self._depth[:, None] - self._depth < window)
            found = self._masks[context, window] = mx.concatenate([before, tree], axis=1)
        return found

    @property
    def rows(self) -> int:
        """Rows of the forward."""
        return self._rows

    def keep(self, path: Sequence[int]) -> None:
        """Leave the rows of a path in the caches, and no others of the tree."""
        rows = mx.array(list(path))
        for leaf in self._leaves:
            leaf.keep(rows, len(path))


class _Leaf:
    """A cache and the tree's keys and values in it."""

    def __init__(self, cache: Any, branches: Branches):
        self.cache, self.start = cache, cache.offset
        self._branches = branches
        self._added: tuple[mx.array, mx.array] | None = None

    def open(self, lie: int) -> None:
        self.cache.make_mask = self._mask
        self.cache.update_and_fetch = self._updating(lie)
        self.cache.offset += lie

    def close(self, lie: int) -> None:
        for name in ("make_mask", "update_and_fetch"):
            vars(self.cache).pop(name, None)
        self.cache.offset -= lie

    def _mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        if self._branches.rows != N:
            raise RuntimeError(f"{N} rows were asked about, of a tree of {self._branches.rows}")
        context = self.start
        if type(self.cache) is mlx_cache.RotatingKVCache:
            window_size = window_size or self.cache.max_size
            context = min(context, self.cache.max_size - 1)
        return self._branches.mask(context, window_size)

    def _updating(self, lie: int) -> Callable[[mx.array, mx.array], Any]:
        def update_and_fetch(keys: mx.array, values: mx.array) -> Any:
            if self._added is not None or keys.shape[-2] != self._branches.rows:
                raise RuntimeError("a cache was not given each row of a tree once")
            self._added = keys, values
            cache = self.cache
            cache.offset -= lie
            fetched = type(cache).update_and_fetch(cache, keys, values)
            cache.offset += lie
            return fetched

        return update_and_fetch

    def keep(self, rows: mx.array, count: int) -> None:
        """Put `count` of the tree's rows behind the context.

        They are taken from what the forward added: a reference to the whole buffer would make its
        next update copy it.
        """
        if self._added is None:
            return
        keys, values = (array[..., rows, :] for array in self._added)
        cache, rule = self.cache, rule_of(self.cache)
        if rule is RING:
            all_rows = self._branches.rows
            cache.keys = mx.concatenate([cache.keys[..., :-all_rows, :], keys], axis=-2)
            cache.values = mx.concatenate([cache.values[..., :-all_rows, :], values], axis=-2)
            cache.offset = self.start + count
            cache._idx = cache.keys.shape[-2]
            return
        (ROWS if rule is ROWS else OFFSET).reset(cache, self.start)
        cache.update_and_fetch(keys, values)


def _turning(rows: int, positions: mx.array) -> Handler:
    """A handler of rotary modules: each row [1, …, rows, D] at a position of its own."""

    def turn(call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x, *rest = args
        if x.shape[0] != 1 or x.ndim < 3 or x.shape[-2] != rows:
            raise RuntimeError(f"rows of shape {x.shape} cannot be turned one by one")
        own = mx.moveaxis(x[0], -2, 0)[..., None, :]
        if rest:
            rest[0] = positions
        else:
            kwargs = {**kwargs, "offset": positions}
        return mx.moveaxis(call(module, own, *rest, **kwargs)[..., 0, :], 0, -2)[None]

    return turn
