"""Making a prompt cache stand for as much of a new prompt as it can, so only the rest is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import stream_generate
from dflash_mlx.decode import PromptCache
from dflash_mlx.errors import InvalidCache
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.target import Snapshot, can_rewind, restore, rewind, snapshot
from dflash_mlx.target.caches import leaves


@dataclass(frozen=True)
class _Moment:
    tokens: list[int]
    target: Snapshot


class ReusableCache:
    """A prompt cache for prompts that mostly begin alike.

    Caches that keep every row are cut where two prompts part. Windows and recurrent state cannot
    be cut: for those a snapshot is kept where `fill` was told that prompts may part.
    """

    def __init__(self, model: SpeculativeModel, tokenizer: TokenizerWrapper):
        self._model, self._tokenizer = model, tokenizer
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.cache: PromptCache = self._model.make_cache()
        self._moment: _Moment | None = None

    @property
    def can_be_cut(self) -> bool:
        """Whether the cache can go back to any prefix, however far it has come."""
        return all(type(leaf) in (KVCache, QuantizedKVCache) for leaf in leaves(self.cache.target))

    def adopt(self, prompt: Sequence[int]) -> int:
        """Take the cache back to a prefix of a prompt, as long as it can.

        Returns:
            The tokens of the prompt that need not be run; fewer than all, since the last one
            gives the first logits.
        """
        # A cache that can be refilled is no better than a new one: the prompt is at hand.
        if not self.cache.valid:
            self.clear()
        cache = self.cache
        common = common_prefix(cache.tokens, prompt[:-1])
        if common < len(cache.tokens) and not self._take_back(common):
            self.clear()
        return len(self.cache.tokens)

    def _take_back(self, common: int) -> bool:
        cache, moment = self.cache, self._moment
        try:
            if can_rewind(cache.target, common):
                rewind(cache.target, common)
                kept = common
            elif (
                moment is not None and cache.tokens[:common][: len(moment.tokens)] == moment.tokens
            ):
                restore(cache.target, moment.target)
                kept = len(moment.tokens)
            else:
                return False
        except InvalidCache:
            return False
        cache.tokens = cache.tokens[:kept]
        cache.context.rewind(kept)
        if moment is not None and kept < len(moment.tokens):
            self._moment = None
        return True

    def remember(self, prompt: Sequence[int], stable: int, **options: Any) -> None:
        """Run a prompt up to `stable`, where the next one may part from it, and remember it.

        The cache must stand for a prefix of the prompt; `options` are `stream_generate`'s. There is
        no need of it where the cache `can_be_cut`.
        """
        cache = self.cache
        if not len(cache.tokens) < stable < len(prompt):
            return
        self._run(list(prompt[len(cache.tokens) : stable + 1]), options)
        self._moment = _Moment(list(cache.tokens), snapshot(cache.target))

    def _run(self, tokens: list[int], options: dict[str, Any]) -> None:
        """Run all tokens but the last into the cache, and emit nothing."""
        given = options.get("prompt_progress_callback") or (lambda done, total: None)

        def stop_before_the_last(done: int, total: int) -> None:
            given(done, total)
            if done == total - 1:
                raise _Done

        options = {**options, "prompt_progress_callback": stop_before_the_last}
        try:
            for _ in stream_generate(
                self._model, self._tokenizer, tokens, prompt_cache=self.cache, **options
            ):
                pass
        except _Done:
            pass


class _Done(Exception):
    pass


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
