"""Copies of the text so far, where the policy wants some."""

from collections.abc import Sequence

from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.decode.phases import phase
from dflash_mlx.policy import Policy

FEW = 64  # tokens; more than a cycle emits, and soon read


class Copying:
    """What one generation copies.

    Attributes:
        on: whether it ever does.
    """

    def __init__(self, cache: PromptCache, policy: Policy, on: bool):
        """A policy that learns nothing never copies."""
        self._cache, self._copies, self._policy = cache, cache.copies, policy
        self.on = on and policy.learns

    def begin(self) -> None:
        """Behind the tokens of the cache now begins an answer."""
        if self.on:
            self._copies.follow(self._cache.tokens)

    @phase("choice")
    def read_on(self) -> None:
        """Make up for a text that the cache stood for already, while the device is at work."""
        if self.on:
            self._copies.read()

    def tokens(self, waiting: Sequence[int] | None, most: int, context: int) -> list[int]:
        """What is to be copied behind the text, and tokens that wait to be emitted, if any.

        Args:
            waiting: None where one waits that nobody has read; it is then taken for the first copy.
            most: proposals that may be verified.
            context: tokens in the target's cache.
        """
        if not self.on or not most:
            return []
        copies = self._copies
        copies.add(self._cache.tokens[len(copies) :])
        copies.add(waiting or ())
        copies.read(FEW)
        tokens, chances = copies.proposals(most + (waiting is None))
        if tokens and waiting is None:
            tokens, chances = tokens[1:], [chances[0] * chances[1], *chances[2:]]
        return tokens[: self._policy.copy(chances, context)] if tokens else []
