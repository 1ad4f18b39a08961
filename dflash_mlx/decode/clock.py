"""The wall time of cycles, taken where the host waits for the device anyway."""

import time


class CycleClock:
    """Times a cycle from the moment one verdict is known to the next.

    The device works on the next cycle while the host still emits the last one, so only a cycle that
    follows another of its kind took its usual time; `changed` marks a plain one that does not.
    Where the device has a draft's forward to do before a plain cycle's token is read, nobody knows
    where one ends and the other begins: the two are timed together.

    Attributes:
        joined: whether the last lap was also that of a plain cycle before.
        changed: whether it was that of a plain cycle with a drafted one before.
    """

    def __init__(self) -> None:
        self._last = 0.0
        self._away = self._left = 0.0
        self._drafted: bool | None = None
        self._joins = self.joined = self.changed = self._spoiled = False

    def join(self) -> None:
        """A plain cycle's verdict came, but the next one's shall count as the same lap."""
        self._joins = self._drafted is False

    def lap(self, drafted: bool) -> float | None:
        """Seconds since the last verdict; None where they tell nothing about any cycle."""
        now = time.perf_counter()
        seconds = now - self._last
        self.changed = self._drafted is True and not drafted
        usual = self._drafted is not None and (self._joins or not drafted or self._drafted)
        # A consumer that took most of the time may have stopped to think.
        usual = usual and self._away < 0.5 * seconds and not self._spoiled
        self._last, self._away, self._drafted = now, 0.0, drafted
        self.joined, self._joins, self._spoiled = self._joins, False, False
        return seconds if usual else None

    def spoil(self) -> None:
        """Something else had the device: the next lap tells nothing."""
        self._spoiled = True

    def leave(self) -> None:
        """The consumer's code begins to run."""
        self._left = time.perf_counter()

    def back(self) -> None:
        """It has run."""
        self._away += time.perf_counter() - self._left
