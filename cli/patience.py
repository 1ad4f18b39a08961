"""Ctrl-C while the main thread is inside one long computation, which Python cannot interrupt."""

import os
import signal
import threading
from collections.abc import Callable

SECONDS = 0.5  # that the main thread has for ending by itself


class Patience:
    """Inside `with`, calls `overdue` in another thread when an interrupt has found no hearing.

    Python hands a signal to the main thread when that comes back from the computation that it is
    in. Where it has not left the `with` within half a second of SIGINT, `overdue` is called, and
    again every half; it ends the process where that can be done. Outside the main thread this does
    nothing.
    """

    def __init__(self, overdue: Callable[[], None]):
        self._overdue, self._over = overdue, threading.Event()

    def __enter__(self) -> "Patience":
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            # Written to as the signal comes, whatever the main thread is doing.
            self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.set_wakeup_fd(self._before)
            self._over.set()
            os.close(self._write)
            self._thread.join()
            os.close(self._read)

    def _watch(self) -> None:
        while received := os.read(self._read, 1):
            if received[0] == signal.SIGINT:
                while not self._over.wait(SECONDS):
                    self._overdue()
