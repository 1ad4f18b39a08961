"""How often to look at what seems to lose: one account of what looks may cost, and rests."""

from dataclasses import dataclass

LOOKING = 0.02  # share of the time that looks may lose
CREDIT = 6.0  # plain steps; the most that looks may lose at once, beside their share
SHORT_REST, LONG_REST = 16.0, 200.0  # plain steps of rest for each that a look lost


@dataclass
class Rest:
    """The time until the next look, which doubles when looks find nothing.

    Attributes:
        left: of it, in plain steps.
        patience: plain steps of rest for each that the next look loses.
    """

    left: float = 0.0
    patience: float = SHORT_REST

    def begin(self, lost: float) -> None:
        """A look lost so many plain steps, and changed nothing."""
        self.left = self.patience * lost
        self.patience = min(2 * self.patience, LONG_REST)

    def end(self) -> None:
        """A look changed something."""
        self.left, self.patience = 0.0, SHORT_REST


class Account:
    """Plain steps that looks may lose: a share of all, and of what drafting gains."""

    def __init__(self) -> None:
        self.credit = CREDIT / 2

    def pays(self, lost: float) -> bool:
        """Whether a look may lose so many plain steps."""
        return self.credit >= lost

    def charge(self, steps: float, tokens: float) -> None:
        """Something took so many plain steps and gave so many tokens."""
        self.credit = min(self.credit + LOOKING * steps + tokens - steps, CREDIT)
