"""The wall time of cycles, taken where the host waits for the device anyway."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class CycleClock:
    """Times a cycle from the moment one verdict is known to the next.

    The device works on the next cycle while the host still emits the last one, so only a cycle that
    follows another of its kind took its usual time.
    """

    def __init__(self) -> None:
        self._last = 0.0
        self._away = 0.0
        self._kind: object = None

    def lap(self, kind: object) -> float | None:
        """Seconds since the last verdict; None where they tell nothing about this kind."""
        now = time.perf_counter()
        seconds, usual = now - self._last, kind == self._kind
        # A consumer that took most of the time may have stopped to think.
        usual = usual and self._away < 0.5 * seconds
        self._last, self._away, self._kind = now, 0.0, kind
        return seconds if usual else None

    @contextmanager
    def away(self) -> Iterator[None]:
        """While the consumer's code runs."""
        tic = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - tic
