"""What a generation has done so far."""

from dataclasses import dataclass


@dataclass
class Statistics:
    """Counts of one generation, first token excluded where it matters.

    Attributes:
        emitted: tokens emitted, the first one (from the prefill) included.
        target_forwards: forwards of the target after the prefill whose tokens were emitted.
        proposed: proposals verified, drafted and copied.
        accepted: emitted tokens that were proposals.
        copies, copied: of either, those that were copied from the text.
        plain_forwards: of the target forwards, those that verified no proposals.
    """

    emitted: int = 0
    target_forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    copies: int = 0
    copied: int = 0
    plain_forwards: int = 0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted per target forward, bonus token included; 0 before the first."""
        return (self.emitted - 1) / self.target_forwards if self.target_forwards else 0.0

    @property
    def verify_length(self) -> float:
        """Mean proposals verified per target forward that verified any; 0 before the first."""
        verifies = self.target_forwards - self.plain_forwards
        return self.proposed / verifies if verifies else 0.0

    @property
    def plain_share(self) -> float:
        """Share of the target's forwards that verified no proposals."""
        return self.plain_forwards / self.target_forwards if self.target_forwards else 0.0
