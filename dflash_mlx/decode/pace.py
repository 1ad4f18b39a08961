"""Whether the machine still runs as it did when plain decoding was last timed."""

from collections import deque
from statistics import median


class Pace:
    """Compares the drafted cycles of late with those right after the last plain ones.

    A moment in which everything is slow ends unseen by plain decoding while drafting wins, and
    drafting would go on winning against a time that is no longer true.
    """

    few = 5  # cycles that are compared
    far = 0.6  # of the time they took is a change

    def __init__(self) -> None:
        self._then: list[float] = []
        self._late: deque[float] = deque(maxlen=self.few)

    @property
    def faster(self) -> bool:
        """Whether cycles take far less time now."""
        full = len(self._late) == self.few
        return full and median(self._late) < self.far * median(self._then)

    def plain(self) -> None:
        """Plain decoding was timed."""
        self._then.clear()
        self._late.clear()

    def observe(self, ratio: float) -> None:
        """A drafted cycle took so many times what it should."""
        if len(self._then) < self.few:
            self._then.append(ratio)
        else:
            self._late.append(ratio)
