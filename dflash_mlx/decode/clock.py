"""The wall time of cycles, taken where the host waits for the device anyway."""

import time
from collections.abc import Callable

from dflash_mlx.policy import Kind, Lap


class CycleClock:
    """Times a cycle from the moment one verdict is known to the next.

    The device works on the next cycle while the host still emits the last one, so only a cycle that
    follows another of its kind takes its usual time. Where the device has a draft's forward to do
    before a plain cycle's token is read, nobody knows where one ends and the other begins: the two
    are timed together.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = self._away = self._left = 0.0
        self._verified: bool | None = None
        self._joined = self._spoiled = False

    def lap(self, drafted: bool, followed: bool = False, copied: bool = False) -> Lap:
        """A cycle's verdict is known.

        Args:
            drafted: whether it had a draft's forward.
            followed: whether the device has got the next cycle's draft already.
            copied: whether it verified without one.
        """
        if followed and not drafted:
            self._spoiled |= self._joined or self._verified is not False
            self._joined = True
            return Lap(0.0, Kind.VOID)
        now = self._now()
        seconds = now - self._last
        if self._verified is None or self._spoiled or self._away > 0.5 * seconds:
            # A consumer that took most of the time may have stopped to think.
            kind = Kind.VOID
        elif copied:
            kind = Kind.COPIED
        elif drafted:
            kind = Kind.ENTRY if self._joined else Kind.DRAFTED if self._verified else Kind.VOID
        else:
            kind = Kind.EXIT if self._verified else Kind.PLAIN
        self._last, self._away, self._verified = now, 0.0, drafted or copied
        self._joined = self._spoiled = False
        return Lap(seconds, kind)

    def spoil(self) -> None:
        """Something else had the device: the next lap tells nothing."""
        self._spoiled = True

    def leave(self) -> None:
        """The consumer's code begins to run."""
        self._left = self._now()

    def back(self) -> None:
        """It has run."""
        self._away += self._now() - self._left
