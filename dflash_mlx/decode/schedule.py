"""How many proposals a cycle drafts and verifies: the strategy's face, and the fixed ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Cycle(NamedTuple):
    """What one cycle did and took, as a strategy learns from it.

    Attributes:
        context: tokens in the target's cache when it began.
        verified: proposals verified; None after a plain cycle.
        accepted: how many of them the target accepted.
        seconds: its wall time; None where that tells nothing about cycles of its kind.
        confidences: the draft's, one per proposal drafted, where they could be had.
        read: whether they were read before the verify was queued.
        after_plain: whether `seconds` are also those of the plain cycle before, or some of them, as
            the device got the draft's forward while it was still at that one.
        after_draft: whether this is the first plain cycle after a draft's forward, which could not
            be queued ahead.
    """

    context: int
    verified: int | None = None
    accepted: int = 0
    seconds: float | None = None
    confidences: Sequence[float] | None = None
    read: bool = False
    after_plain: bool = False
    after_draft: bool = False


class VerifyLength(Protocol):
    """The strategy a cycle asks before it drafts, and again before it verifies.

    `learns` says whether it wants to be told how cycles went, with the draft's confidences.
    """

    learns: bool

    def choose(self, most: int, context: int, narrows: bool = True) -> int:
        """Proposals to draft now, 0 … most; 0 is a plain cycle without a draft forward.

        Args:
            most: what the block and the room left allow.
            context: tokens in the target's cache.
            narrows: whether `narrow` will be asked. It must not be where proposals are drawn at
                random: verifying more or fewer of them for what was drawn would bend the
                distribution of the text.
        """
        ...

    def narrow(self, read: Callable[[], Sequence[float]]) -> int:
        """How many of the proposals just drafted to verify, 0 … as many as chosen.

        Args:
            read: gives the draft's confidence in each of them, and waits for the draft.
        """
        ...

    def observe(self, cycle: Cycle) -> None:
        """Learn how a cycle went; never called where it does not learn."""
        ...

    def finish(self) -> None:
        """The generation is over."""
        ...


@dataclass
class FixedLength:
    """Always the same number of proposals; 0 is plain decoding."""

    length: int
    learns = False

    def choose(self, most: int, context: int, narrows: bool = True) -> int:
        self._count = min(self.length, most)
        return self._count

    def narrow(self, read: Callable[[], Sequence[float]]) -> int:
        return self._count

    def observe(self, cycle: Cycle) -> None:
        pass

    def finish(self) -> None:
        pass
