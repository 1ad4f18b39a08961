"""From plain decoding to drafting and back: what the way costs, beside the cycles themselves."""

from collections import deque
from statistics import median

from dflash_mlx.decode.cost import Costs
from dflash_mlx.decode.schedule import Cycle


class Excursions:
    """Learns what a change to drafting and back takes longer than its cycles.

    The draft's context has to catch up, and the first plain cycle afterwards could not be queued
    ahead. Short excursions are timed from the plain cycle before to the one after, both included.
    """

    longest = 3  # drafted cycles; over more of them their own noise would hide the rest
    guess, weight = 0.1, 3  # in plain steps, and the excursions that the guess counts for

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=15)
        self._seconds: float | None = None
        self._expected, self._cycles = 0.0, 0
        self.steps = self.guess

    def observe(self, cycle: Cycle, now: Costs) -> None:
        """Learn from the next cycle, whatever its kind.

        Args:
            cycle: what it did and took.
            now: what its parts should have taken.
        """
        drafted = cycle.verified is not None
        if cycle.after_plain:
            self._seconds, self._expected, self._cycles = 0.0, now.plain, 0
        if self._seconds is None:
            return
        self._cycles += drafted
        if cycle.seconds is None or self._cycles > self.longest:
            self._seconds = None
            return
        self._seconds += cycle.seconds
        if cycle.verified is not None:
            self._expected += now.cycle[cycle.verified] + cycle.read * now.reading
            return
        extra = (self._seconds - self._expected - now.plain) / now.plain
        self._seconds = None
        self._recent.append(extra)
        n, middle = len(self._recent), max(median(self._recent), 0.0)
        self.steps = (n * middle + self.weight * self.guess) / (n + self.weight)
