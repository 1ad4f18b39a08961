"""The target's forwards over one sequence: its caches, and the features that they leave behind."""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache

from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.decode.device import DeviceWork, queue
from dflash_mlx.decode.feed import ContextFeed
from dflash_mlx.decode.options import Options
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.errors import UnsupportedTarget
from dflash_mlx.propose import Tree
from dflash_mlx.target import TargetView, Transaction


class Forwards:
    """Runs tokens whose rows all stay, or verifies a block of which only the emitted ones do.

    Attributes:
        cached: tokens in the target's caches; of a verify from its commit on.
        feed: what the draft is still to be given of them.
    """

    def __init__(
        self,
        view: TargetView,
        draft: DFlashDraft,
        cache: PromptCache,
        options: Options,
        taps: Sequence[int],
    ):
        """`taps` are the layers whose outputs the draft wants; none leaves its context behind."""
        self._view, self._cache, self._options, self._taps = view, cache, options, taps
        self.feed = ContextFeed(draft, cache.context)
        self.cached = len(cache.tokens)
        # Of a borrowed cache the tokens before are unknown, and not counted.
        self._shift = cache.context.offset - self.cached
        self._transaction: Transaction | None = None
        self._accepted = 0
        self._path: Sequence[int] | None = None

    @property
    def verifying(self) -> bool:
        """Whether a verify is still to be committed."""
        return self._transaction is not None

    @property
    def position(self) -> int:
        """The position that follows all rows, those of accepted tokens included."""
        return self._shift + self.cached + (self._accepted if self.verifying else 0)

    @property
    def behind(self) -> list[int]:
        """Emitted tokens that are not in the target's caches."""
        return self._cache.tokens[self.cached :]

    def run(self, tokens: mx.array, tapped: bool = True) -> mx.array:
        """A forward whose rows [n] all stay: logits [1, n, V]."""
        taps = self._taps if tapped else ()
        logits, features = self._view.forward(tokens[None], self._cache.target, taps)
        self.feed.add(features, tokens.size)
        self.cached += tokens.size
        self._quantize()
        return logits

    def verify(
        self, block: mx.array, tree: Tree | None = None
    ) -> tuple[mx.array, Sequence[mx.array]]:
        """A forward over an anchor and proposals [m + 1]; `accept` and `commit` have to follow.

        Args:
            block: ids.
            tree: how the proposals hang together; None for a line.

        Returns:
            Logits [m + 1, V], and one array [1, m + 1, H] per tap.
        """
        self._transaction = self._view.begin(self._cache.target)
        logits, features = self._transaction.forward(block[None], self._taps, tree)
        queue(logits, *features)
        return logits[0], features

    def accept(
        self, features: Sequence[mx.array], rows: int, path: Sequence[int] | None = None
    ) -> None:
        """The first rows of the verify stand, the anchor's and those of accepted proposals; of a
        tree, the rows of its path."""
        self._accepted, self._path = rows, path
        taken = slice(rows) if path is None else mx.array(list(path))
        self.feed.add([tap[:, taken] for tap in features], rows)

    def commit(self) -> None:
        """Keep the rows of emitted tokens in the target's caches, and no others."""
        if self.feed.full:
            with DeviceWork(self._cache):
                self.feed.flush()
                queue(*self._cache.context.arrays)
        if self._transaction is None:
            return
        with DeviceWork(self._cache):
            kept = min(len(self.behind), self._accepted)
            self._transaction.commit(kept, self._path)
            self._transaction = None
            self.cached += kept
            self._quantize()

    def close(self) -> None:
        """Leave a cache that is kept standing for the tokens that were emitted."""
        with DeviceWork(self._cache):
            if self.behind:
                self.run(mx.array(self.behind))
            self.feed.rewind(self.position)
            self._cache.evaluate()

    def _quantize(self) -> None:
        o = self._options
        try:
            maybe_quantize_kv_cache(
                self._cache.target, o.quantized_kv_start, o.kv_group_size, o.kv_bits
            )
        except NotImplementedError as error:
            raise UnsupportedTarget(
                "This target has sliding-window caches, which mlx-lm cannot quantize; leave out "
                "kv_bits."
            ) from error
