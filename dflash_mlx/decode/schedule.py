"""How many proposals a cycle verifies."""

from dataclasses import dataclass
from typing import Protocol


class VerifyLength(Protocol):
    """The strategy a cycle asks before it spends anything."""

    def choose(self, most: int) -> int:
        """Proposals to verify now, 0 … most; 0 is a plain cycle without a draft forward."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always the same number of proposals; 0 is plain decoding."""

    length: int

    def choose(self, most: int) -> int:
        return min(self.length, most)
