"""What is kept of a sequence between calls: the target's caches and the draft's context."""

import warnings
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache as make_target_cache

from dflash_mlx.draft import Context
from dflash_mlx.errors import InvalidCache


class PromptCache:
    """The state of one sequence.

    `tokens` are the ids that the target's caches stand for, in order. After a failure in the
    middle of a forward the caches are invalid; the next use says so and fills them again.
    """

    def __init__(self, target: list[Any], context: Context):
        self.target = target
        self.context = context
        self.tokens: list[int] = []
        self.valid = True

    def invalidate(self) -> None:
        """Mark the caches as left in an unknown state."""
        self.valid = False

    def refresh(self, model: nn.Module) -> list[int]:
        """Make the caches usable again after a failure.

        Returns:
            Tokens that must be run again before anything new; empty when all was well.
        """
        if self.valid:
            return []
        warnings.warn(
            "An exception left this prompt cache half-written; it is filled again, which costs "
            f"a prefill of {len(self.tokens)} tokens.",
            stacklevel=2,
        )
        self.target[:] = make_target_cache(model)
        self.context.restart(0)
        tokens, self.tokens, self.valid = self.tokens, [], True
        return tokens

    @property
    def nbytes(self) -> int:
        """Bytes held by the target's caches and the draft's context."""
        return sum(cache.nbytes for cache in self.target) + self.context.nbytes


class BorrowedCache(PromptCache):
    """A plain mlx_lm cache list, updated in place; its draft context starts empty.

    The tokens it already stands for are unknown, so a failure cannot be mended: the list is then
    filled with placeholders that raise on any use.
    """

    def __init__(self, target: list[Any], context: Context):
        if any(isinstance(cache, _Placeholder) for cache in target):
            raise InvalidCache(_LOST)
        super().__init__(target, context)
        context.restart(max((getattr(cache, "offset", 0) or 0 for cache in target), default=0))

    def invalidate(self) -> None:
        self.valid = False
        self.target[:] = [_Placeholder() for _ in self.target]


_LOST = (
    "An exception left this prompt cache half-written, and what it stood for is unknown; make a "
    "new one with make_prompt_cache."
)


class _Placeholder:
    def __getattr__(self, name: str) -> Any:
        raise InvalidCache(_LOST)
