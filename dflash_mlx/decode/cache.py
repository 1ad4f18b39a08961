"""What is kept of a sequence between calls: the target's caches and the draft's context."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache as make_target_cache

from dflash_mlx.draft import Context
from dflash_mlx.draft.context import ContextMark
from dflash_mlx.errors import InvalidCache
from dflash_mlx.propose import Copies
from dflash_mlx.target import (
    Snapshot,
    can_rewind,
    cut,
    fork,
    keeps_rows,
    restore,
    rewind,
    snapshot,
)
from dflash_mlx.target.caches import COUNTING, rule_of
from dflash_mlx.target.leaf import Counting, Leaf, leaves


@dataclass(frozen=True)
class Moment:
    """A moment of a prompt cache: `count` tokens, and what they left behind."""

    count: int
    target: Snapshot
    context: ContextMark

    @property
    def nbytes(self) -> int:
        """Bytes held besides the cache's own, once it has changed."""
        return self.target.nbytes + self.context.nbytes


class PromptCache:
    """The state of one sequence.

    `tokens` are the ids that the target's caches stand for, in order. After a failure in the
    middle of a forward the caches are invalid; the next use says so and fills them again.

    As a sequence it is the target's caches, so that mlx_lm's own functions take it, too.

    `prompt_begin` is for callers that run a prompt in parts: how many tokens the cache stood for
    when the prompt began whose rest is run next, so that logits processors see all of it.

    `copies` knows the tokens, and perhaps some that they do not reach any more.
    """

    def __init__(self, target: list[Leaf], context: Context):
        self.target = target
        self.context = context
        self.tokens: list[int] = []
        self.valid = True
        self.prompt_begin: int | None = None
        self.copies = Copies()

    def invalidate(self) -> None:
        """Mark the caches as left in an unknown state."""
        self.valid = False

    def evaluate(self) -> None:
        """Compute all that a filled cache holds, so that another thread may go on with it.

        MLX's streams belong to a thread: what is still to be computed can be so there alone.
        """
        mx.eval([c.state for c in self.target], self.context.arrays)

    def refresh(self, model: nn.Module) -> list[int]:
        """Make the caches usable again after a failure.

        Returns:
            Tokens that must be run again before anything new; empty when all was well.

        Raises:
            InvalidCache: something else has extended the target's caches.
        """
        if self.valid:
            self.follow()
            return []
        warnings.warn(
            "An exception left this prompt cache half-written; it is filled again, which costs "
            f"a prefill of {len(self.tokens)} tokens.",
            stacklevel=2,
        )
        self.target[:] = make_target_cache(model)
        self.context.renew()
        tokens, self.tokens, self.valid = self.tokens, [], True
        return tokens

    def follow(self) -> None:
        """Forget what mlx_lm's `trim_prompt_cache` has taken out of the target's caches alone.

        Raises:
            InvalidCache: something else has extended them.
        """
        rows = _rows(self.target)
        if rows is None or rows == len(self.tokens):
            return
        if rows > len(self.tokens):
            raise InvalidCache(
                f"This prompt cache stands for {len(self.tokens)} tokens, but its target's caches "
                f"were extended to {rows} by something else; give its `target`, a plain mlx_lm "
                "cache, or make a new one."
            )
        self.context.rewind(self.context.offset - len(self.tokens) + rows)
        del self.tokens[rows:]

    def __len__(self) -> int:
        return len(self.target)

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self.target)

    def __getitem__(self, index: Any) -> Any:
        return self.target[index]

    def __setitem__(self, index: Any, cache: Leaf) -> None:
        self.target[index] = cache

    def moment(self) -> Moment:
        """Remember this moment, between two generations; until a return the cache may only grow."""
        return Moment(len(self.tokens), snapshot(self.target), self.context.mark())

    def holds(self, count: int) -> bool:
        """Whether `rewind(count)` leaves all that a cache run afresh would have."""
        return can_rewind(self.target, count) and self.context.holds(count)

    def rewind(self, count: int) -> None:
        """Go back to the first `count` tokens.

        Raises:
            InvalidCache: it does not hold what they left behind; it is as it was.
        """
        rewind(self.target, count)
        self.context.rewind(count)
        del self.tokens[count:]

    def restore(self, moment: Moment) -> None:
        """Go back to a moment of this cache.

        Raises:
            InvalidCache: it has changed its kind since, or was cut; it is as it was.
        """
        restore(self.target, moment.target)
        self.context.reset(moment.context)
        del self.tokens[moment.count :]

    @property
    def keeps_all(self) -> bool:
        """Whether it can go back to any prefix, however far it has come."""
        limited = any(group.limit is not None for group in self.context.groups)
        return not limited and keeps_rows(self.target)

    def cut(self, count: int) -> Moment:
        """The moment when it had `count` tokens, for targets that keep every row.

        Raises:
            InvalidCache: this one does not, or the draft's context has dropped what was seen then.
        """
        if not self.context.holds(count):
            raise InvalidCache(f"The draft's context cannot be cut to {count} positions.")
        return Moment(count, cut(self.target, count), self.context.cut(count))

    def fork(self, moment: Moment) -> "PromptCache":
        """Another cache that stands at a moment of this one, rows copied.

        Raises:
            InvalidCache: where `restore` would.
        """
        with mx.stream(generation_stream):
            other = PromptCache(fork(self.target, moment.target), self.context.fork(moment.context))
            mx.eval([c.state for c in other.target], other.context.arrays)
        other.tokens = self.tokens[: moment.count]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes held by the target's caches and the draft's context."""
        return sum(cache.nbytes for cache in self.target) + self.context.nbytes


def _rows(target: list[Leaf]) -> int | None:
    """The tokens that a target's caches hold; None where none of them counts."""
    counted = (cast(Counting, c).offset for c in leaves(target) if rule_of(c) in COUNTING)
    return max(counted, default=None)


class BorrowedCache(PromptCache):
    """A plain mlx_lm cache list, updated in place; its draft context starts empty.

    The tokens it already stands for are unknown, so a failure cannot be mended: the list is then
    filled with placeholders that raise on any use.
    """

    def __init__(self, target: list[Leaf], context: Context):
        if any(isinstance(cache, _Placeholder) for cache in target):
            raise InvalidCache(_LOST)
        super().__init__(target, context)
        context.restart(max((getattr(cache, "offset", 0) or 0 for cache in target), default=0))

    def follow(self) -> None:
        """Nothing to do: it was borrowed as it is."""

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
