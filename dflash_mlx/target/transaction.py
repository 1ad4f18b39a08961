"""Verify several tokens, then keep only the first of them in every layer's cache."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.propose import Tree
from dflash_mlx.target.branches import Branches
from dflash_mlx.target.caches import Rule, rule_of
from dflash_mlx.target.fast_verify import FastVerify
from dflash_mlx.target.leaf import Leaf, leaves
from dflash_mlx.target.replay import MixerReplay, Mixers
from dflash_mlx.target.taps import Features, TappedForward
from dflash_mlx.target.watch import layered


class Transaction:
    """One verify on a cache: `forward` once, then `commit` once.

    The first verify token is always kept. There is no way back to none of them: a full rotating
    window has already lost its oldest rows. If `forward` raises, the cache is in an unknown state.
    """

    def __init__(
        self,
        forward: TappedForward,
        mixers: Mixers,
        fast: FastVerify,
        cache: list[Leaf],
        rotary: Sequence[nn.Module] = (),
    ):
        """All of one target, of which the cache is, too."""
        self._rotary = rotary
        self._target, self._mixers, self._fast, self._cache = forward, mixers, fast, cache
        self._marks: list[tuple[Rule[Any], Leaf, Any]] = []
        self._tokens: mx.array | None = None
        self._whole = False
        self._replay: MixerReplay | None = None
        self._branches: Branches | None = None

    def forward(
        self, tokens: mx.array, taps: Sequence[int] = (), tree: Tree | None = None, *, lie: int = 0
    ) -> tuple[mx.array, Features]:
        """The verify forward.

        Args:
            tokens: [1, m].
            taps: the layers whose outputs are wanted.
            tree: of a target that takes trees, how the tokens behind the first hang together; None
                for a line.
            lie: for a trial, see `Branches`.

        Returns:
            Logits [1, m, V], and one array [1, m, H] per tap.

        Raises:
            UnsupportedTarget: the cache cannot be taken back exactly.
        """
        self._tokens = tokens
        if tokens.shape[1] == 1:  # kept whole by any commit
            return self._target(tokens, self._cache, taps)
        found = [(rule_of(leaf), leaf) for leaf in leaves(self._cache)]
        self._whole = whole = self._mixers.whole(rule for rule, _ in found)
        if not whole and any(rule.replays for rule, _ in found):
            self._replay = self._mixers.replay()
        self._marks = [(rule, leaf, rule.mark(leaf, whole)) for rule, leaf in found]
        if tree is not None:
            self._branches = Branches(tree, self._cache, self._rotary, lie=lie)
            kernels = self._fast.handlers(tokens.size)
            handlers = layered(self._branches.handlers(), kernels)
            with self._branches:
                return self._target(tokens, self._cache, taps, handlers)
        replay = self._replay.handlers() if self._replay else []
        handlers = layered(replay, self._fast.handlers(tokens.size))
        return self._target(tokens, self._cache, taps, handlers)

    def commit(self, kept: int, path: Sequence[int] | None = None) -> None:
        """Leave exactly the first `kept` of the verified tokens in the cache, 1 <= kept <= m.

        Of a tree, the first `kept` of a path's rows, which goes from the anchor's row 0 down.
        Keeping all of them costs nothing. Array work is only queued, never waited for.
        """
        if self._tokens is None:
            raise RuntimeError("commit needs exactly one forward before it")
        tokens, rows = self._tokens, self._tokens.shape[1]
        if not 1 <= kept <= rows:
            raise ValueError(f"cannot keep {kept} of {rows} verified tokens")
        leading = path is None or list(path[:kept]) == list(range(kept))
        if self._branches is not None and path is not None and not leading:
            self._branches.keep(path[:kept])
        elif kept < rows:
            if self._whole:
                for rule, leaf, mark in self._marks:
                    rule.reset(leaf, mark)
                self._target(tokens[:, :kept], self._cache)
            else:
                for rule, leaf, mark in self._marks:
                    if rule.replays:
                        rule.reset(leaf, mark)
                    else:
                        rule.commit(leaf, mark, rows, kept)
                if self._replay is not None:
                    self._replay.run(rows, kept)
        self._marks, self._tokens, self._replay, self._branches = [], None, None, None
