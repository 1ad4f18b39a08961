"""A target and its draft: checked when they are paired."""

from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.distributed import Ranks
from dflash_mlx.draft import DFlashDraft, NoDraft
from dflash_mlx.errors import InvalidCache, PairError
from dflash_mlx.policy import Learned
from dflash_mlx.target import TargetView

_NO_MODEL = (
    "This is a target with its draft and not a model by itself; call dflash_mlx's generate or "
    "stream_generate with it, and give its `target` to functions of mlx_lm."
)


class SpeculativeModel:
    """A target, the draft that proposes for it, and the view through which it is used.

    Attributes:
        target: the mlx-lm model, the caller's own object; it stays usable with plain mlx_lm.
        draft: the draft, or what stands for none.
        view: the target as DFlash sees it.
        learned: what generations with verify_length="auto" found out so far; None before the first.
        ranks: the processes over which the target is sharded; None where it is not.
    """

    def __init__(
        self,
        target: nn.Module,
        draft: DFlashDraft | None,
        group: mx.distributed.Group | None = None,
    ):
        """Pair the two; without a draft there is verify_length="off" alone, plain decoding.

        Args:
            group: the processes over which mlx-lm's `shard` has divided the target; the draft is
                whole in each of them. All must then make the same calls in the same order.

        Raises:
            PairError: the draft was not made for this target, or one of the two is something else.
            UnsupportedTarget: the target's family cannot work.
        """
        if not callable(target) or isinstance(target, SpeculativeModel | DFlashDraft):
            raise PairError(
                f"The target is a {type(target).__name__}; give a model that mlx_lm loaded."
            )
        if draft is not None and not hasattr(draft, "propose"):
            raise PairError(
                f"The draft is a {type(draft).__name__}; give one that load_draft made, or None."
            )
        self.target = target
        self.draft = NoDraft() if draft is None else draft
        self.view = TargetView(target)
        self.learned: Learned | None = None
        self.ranks = Ranks(group) if group is not None and group.size() > 1 else None
        if draft is not None:
            check_pair(self.view, draft)
        for model in (target, self.draft):  # stand-ins need be no modules
            if isinstance(model, nn.Module):
                _compute_constants(model)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """A pair is no model; says what to do where one is wanted."""
        raise PairError(_NO_MODEL)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"A pair has no {name!r}. {_NO_MODEL}")

    def make_cache(self) -> PromptCache:
        """An empty prompt cache for one sequence; any thread may use it."""
        cache = PromptCache(self.view.make_cache(), self.draft.make_context())
        mx.eval(cache.context.arrays)
        return cache

    def check_cache(self, cache: PromptCache) -> None:
        """Refuse a prompt cache of another pair.

        Raises:
            InvalidCache: the target has another number of caches, or the draft another context.
        """
        if len(cache.target) != len(self.view.make_cache()):
            raise InvalidCache(
                "This prompt cache was made for another target; make a new one with "
                "make_prompt_cache."
            )
        if not cache.context.resembles(self.draft.make_context()):
            raise InvalidCache(
                "This prompt cache holds the context of another draft; give its `target`, a plain "
                "mlx_lm cache, or make a new one with make_prompt_cache."
            )


def _compute_constants(model: nn.Module) -> None:
    """Compute what modules keep beside their weights, as frequencies of a rope.

    It is computed when it is first used, and that may be in another thread, which cannot reach the
    stream of the one that loaded the model.
    """
    mx.eval(
        [
            value
            for module in model.modules()
            for name, value in module.items()
            if name.startswith("_") and isinstance(value, mx.array)
        ]
    )


def check_pair(view: TargetView, draft: DFlashDraft) -> None:
    """Raise PairError, in one sentence, if a draft cannot have been made for a target."""
    config, vocabulary = draft.config, draft.config.vocabulary
    borrows = not (vocabulary.own_embedding and vocabulary.own_head)
    if config.target_hidden_size != view.hidden_size or (
        borrows and config.hidden_size != view.hidden_size
    ):
        raise PairError(
            f"The draft is {config.hidden_size} wide and the target {view.hidden_size}, so they "
            "are not a pair; give the draft that was trained for this target."
        )
    deepest = max(config.target_layer_ids)
    if deepest >= view.depth:
        raise PairError(
            f"The draft taps layer {deepest} of a target that has layers 0 to {view.depth - 1}; "
            "give the draft that was trained for this target."
        )
    if config.num_target_layers is not None and config.num_target_layers != view.depth:
        raise PairError(
            f"The draft was trained for a target of {config.num_target_layers} layers and this one "
            f"has {view.depth}; give the draft that was trained for this target."
        )
    # A DFlash 1 has no table of tokens, and targets' tables are padded now and then.
    tables = config.head is not None or vocabulary.own_head or vocabulary.own_embedding
    if tables and vocabulary.size not in (None, view.vocab_size):
        raise PairError(
            f"The draft was trained with a vocabulary of {vocabulary.size} tokens and the target "
            f"has {view.vocab_size}; give the draft that was trained for this target."
        )
    if not 0 <= config.mask_token_id < view.vocab_size:
        raise PairError(
            f"The draft's mask token {config.mask_token_id} lies outside the target's embedding of "
            f"{view.vocab_size} tokens; give the draft that was trained for this target."
        )
