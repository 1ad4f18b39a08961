"""The decisions of one generation, taken by rank 0 and sent to the others as integers.

Ranks compute the same numbers only up to rounding, and their clocks differ. So rank 0's tokens are
every rank's: proposals, and what the target chose. How much to propose, and whether the user wants
an end, is asked of rank 0 once a cycle. Everything else follows from these integers.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from dflash_mlx.decode.interrupts import Interrupts
from dflash_mlx.decode.plain import PlainChoice
from dflash_mlx.distributed.ranks import Ranks
from dflash_mlx.policy import Cycle, Policy, Sign
from dflash_mlx.propose import Proposals

# Cycles that follow when rank 0 chooses a plain one. To be told costs a plain cycle the overlap of
# host and device, as the message waits for the token before.
PLAIN_RUN = 4


class Decisions:
    """The `Agreement` of one generation."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._interrupts = SharedInterrupts(ranks)

    def policy(self, policy: Policy) -> Policy:
        return SharedPolicy(policy, self._ranks, self._interrupts)

    def choice(self, choice: PlainChoice) -> PlainChoice:
        return SharedChoice(choice, self._ranks)

    def proposals(self, proposals: Proposals) -> Proposals:
        tokens = self._ranks.shared(proposals.tokens)
        return Proposals(tokens, proposals.confidence, likelihood=proposals.likelihood)

    def interrupts(self) -> Interrupts:
        return self._interrupts


class SharedChoice(PlainChoice):
    """Chooses in every rank, so that all draw as often, and takes what rank 0 chose."""

    def __init__(self, choice: PlainChoice, ranks: Ranks):
        self._own, self._ranks = choice, ranks
        self.at_once = choice.at_once

    @property
    def decided(self) -> int:  # type: ignore[override]
        return self._own.decided

    def __call__(self, logprobs: mx.array, depths: mx.array | None = None) -> mx.array:
        return self._ranks.shared(self._own(logprobs, depths))

    def move(self, count: int) -> None:
        self._own.move(count)


class SharedInterrupts(Interrupts):
    """Ctrl-C in rank 0 interrupts all ranks behind the same cycle; the others' are nobody's.

    A consumer's code is never interrupted: it would leave the generation in one rank alone.
    """

    def __init__(self, ranks: Ranks):
        super().__init__()
        self._ranks = ranks
        self._told: bool | None = None
        self._inside = False

    def __enter__(self) -> "SharedInterrupts":
        super().__enter__()
        self._inside = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._inside, self._told = False, None
        super().__exit__(kind, *rest)

    def hold(self, holding: bool) -> None:
        super().hold(holding or self._inside)

    @property
    def wanted(self) -> bool:
        """Whether somebody has asked this rank to stop."""
        return self._received

    def tell(self, stop: bool) -> None:
        """What the next `check` shall believe without asking: rank 0 has said it already."""
        self._told = stop

    def check(self) -> None:
        if self._told is None:
            self._told = bool(self._ranks.told([self._received])[0])
        stop, self._told = self._told, None
        if stop:
            self._received = False
            raise KeyboardInterrupt


class SharedPolicy:
    """A policy of rank 0, whose decisions all ranks follow.

    `learns` is the same everywhere, so that all ranks compute the same. One that learns nothing
    decides the same everywhere, and only whether the user wants an end is asked. Proposals are
    lines, as each rank would grow a tree of its own.
    """

    nodes = 0

    def __init__(self, policy: Policy, ranks: Ranks, interrupts: SharedInterrupts):
        self._own, self._ranks, self._interrupts = policy, ranks, interrupts
        self.learns, self.reason = policy.learns, policy.reason
        self._decides = ranks.leads or not policy.learns
        self._plain_left = 0

    def copy(self, chances: Sequence[float], context: int) -> int:
        """As `Policy.copy`; all ranks see the same tokens, and so the same chances."""
        if self._plain_left or not self.learns:
            return 0
        count = self._own.copy(chances, context) if self._decides else 0
        return self._ranks.told([count])[0]

    def choose(self, most: int, context: int) -> int:
        """As `Policy.choose`; behind a plain cycle come others about which nobody is asked."""
        if self._plain_left:
            self._plain_left -= 1
            self._interrupts.tell(False)
            return self._own.choose(0, context) if self._decides else 0
        count = self._own.choose(most, context) if self._decides else 0
        self.reason = self._own.reason
        count, stop = self._ranks.told([count, self._interrupts.wanted])
        self._interrupts.tell(bool(stop))
        if not count:
            self._plain_left = PLAIN_RUN - 1
        return count

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        count = self._own.narrow(read) if self._decides else 0
        return self._ranks.told([count])[0] if self.learns else count

    def prune(self, chances: Sequence[float]) -> int:
        return len(chances)

    def observe(self, cycle: Cycle) -> None:
        if self._decides:
            self._own.observe(cycle)

    def finish(self) -> None:
        if self._decides:
            self._own.finish()
