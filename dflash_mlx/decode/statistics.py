"""What a generation has done so far."""

from dataclasses import dataclass


@dataclass
class Statistics:
    """Counts of one generation, first token excluded where it matters.

    Attributes:
        emitted: tokens emitted, the first one (from the prefill) included.
        target_forwards: forwards of the target after the prefill whose tokens were emitted.
        proposed: proposals verified.
        accepted: emitted tokens that were proposals.
        plain_forwards: of the target forwards, those whose cycle had no draft forward.
    """

    emitted: int = 0
    target_forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    plain_forwards: int = 0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted per target forward, bonus token included; 0 before the first."""
        return (self.emitted - 1) / self.target_forwards if self.target_forwards else 0.0

    @property
    def verify_length(self) -> float:
        """Mean proposals verified per cycle with a draft forward; 0 before the first."""
        drafted = self.target_forwards - self.plain_forwards
        return self.proposed / drafted if drafted else 0.0

    @property
    def plain_share(self) -> float:
        """Share of the target's forwards whose cycle had no draft forward."""
        return self.plain_forwards / self.target_forwards if self.target_forwards else 0.0
