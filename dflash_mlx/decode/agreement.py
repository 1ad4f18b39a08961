"""What processes that decode the same text together have to settle between them.

One process alone settles nothing. Of several, each with a shard of the target, all must do the same
work in the same order, so what may come out differently in each is decided once and sent round:
what a policy chooses from the clock, tokens read from the device, an interrupt.
"""

from typing import Protocol

from dflash_mlx.decode.interrupts import Interrupts
from dflash_mlx.decode.plain import PlainChoice
from dflash_mlx.policy import Policy
from dflash_mlx.propose import Proposals


class Agreement(Protocol):
    """Asked once for each generation, but for the proposals, which are settled one by one."""

    def policy(self, policy: Policy) -> Policy:
        """A policy whose decisions all processes share."""
        ...

    def choice(self, choice: PlainChoice) -> PlainChoice:
        """A choice of tokens that all processes share."""
        ...

    def proposals(self, proposals: Proposals) -> Proposals:
        """The proposals that all processes verify."""
        ...

    def interrupts(self) -> Interrupts:
        """Interrupts that reach all processes at the same place."""
        ...


class Alone:
    """There is one process."""

    def policy(self, policy: Policy) -> Policy:
        return policy

    def choice(self, choice: PlainChoice) -> PlainChoice:
        return choice

    def proposals(self, proposals: Proposals) -> Proposals:
        return proposals

    def interrupts(self) -> Interrupts:
        return Interrupts()
