"""The door between the decode loop and whoever decides how much to propose."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

# How sure a draft is of a proposal, 0 … 1, or several views of that, always as many.
Sign = float | Sequence[float]


class Kind(Enum):
    """What was timed. ENTRY is a drafted cycle and the plain one before it, which the device was
    still at; EXIT is a plain cycle behind a verify; COPIED is a verify without a draft; VOID tells
    nothing about any cycle."""

    PLAIN = "plain"
    DRAFTED = "drafted"
    ENTRY = "entry"
    EXIT = "exit"
    COPIED = "copied"
    VOID = "void"


class Lap(NamedTuple):
    """Wall time from one verdict to the next, in seconds."""

    seconds: float
    kind: Kind


class Grown(NamedTuple):
    """The nodes of a tree that were verified, best first.

    Attributes:
        chances: what the draft gives each, that the target goes through it.
        passed: whether it did.
        line: how many of them are the likeliest line.
        kept: through how many of that line, from its start, the target went.
    """

    chances: Sequence[float]
    passed: Sequence[bool]
    line: int
    kept: int


class Cycle(NamedTuple):
    """What one cycle did, as a policy learns from it.

    Attributes:
        context: tokens in the target's cache when it began.
        lap: its time.
        drafted, verified, accepted: proposals; `drafted` is 0 for a cycle without a draft.
        confidences: the draft's, one per proposal drafted; empty where it gives none.
        read: whether `narrow` read them, so that the verify had to wait for the draft.
        copied: whether the proposals were copied.
        tree: where they were a tree's nodes.
    """

    context: int
    lap: Lap
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    confidences: Sequence[Sign] = ()
    read: bool = False
    copied: bool = False
    tree: Grown | None = None


class Policy(Protocol):
    """Decides for one generation what every cycle drafts and verifies.

    Where earlier text may be copied the loop calls `copy`, twice if the first answer was about a
    token yet unread. Where nothing is copied at first it calls `choose`, then `narrow` if that was
    not 0, or `prune` if `nodes` is not 0 either and the target takes trees. In the end it calls
    `finish`.
    A cycle that verified something is observed before the next `choose`. Behind any other the next
    one is chosen first, as the device must not wait for the host: it is observed between that
    `choose` and the `narrow` or `prune` that follows. The last cycle may never be observed.

    Attributes:
        learns: whether `observe` is to be called at all.
        reason: why it has stopped drafting, as half a sentence; None where it has not.
        nodes: the most that a tree shall have, of what `choose` has drafted; 0 for a line.
    """

    learns: bool
    reason: str | None

    @property
    def nodes(self) -> int: ...

    def copy(self, chances: Sequence[float], context: int) -> int:
        """Proposals to copy now, 0 … all, with `context` tokens in the target's cache, where each
        has this chance if those before it are accepted."""

    def choose(self, most: int, context: int) -> int:
        """Proposals to draft now, 0 … most, with `context` tokens in the target's cache; 0 is a
        plain cycle."""

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        """How many of the proposals just drafted to verify, 0 … all; `read` waits for the draft and
        gives its confidence in each, or nothing."""

    def prune(self, chances: Sequence[float]) -> int:
        """How many nodes of the tree just grown to verify, 0 … all; best first, the draft gives
        them these chances."""

    def observe(self, cycle: Cycle) -> None:
        """Learn how a cycle went."""

    def finish(self) -> None:
        """The generation is over."""


class FixedLength:
    """Always the same number of proposals, all drafted; 0 is plain decoding.

    With `nodes` the proposals are a tree of that many, as deep as the length.
    """

    learns = False
    reason: str | None = None

    def __init__(self, length: int, nodes: int = 0):
        self.length = self._count = length
        self.nodes = nodes

    def copy(self, chances: Sequence[float], context: int) -> int:
        return 0

    def choose(self, most: int, context: int) -> int:
        self._count = min(self.length, most)
        return self._count

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        return self._count

    def prune(self, chances: Sequence[float]) -> int:
        return len(chances)

    def observe(self, cycle: Cycle) -> None: ...

    def finish(self) -> None: ...
