"""Ctrl-C is honoured between cycles, so that no cache is left half-written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Holds SIGINT back inside `with`, except inside `with interrupts.open()`.

    Outside the main thread Python delivers no signals, and this does nothing.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    def __enter__(self) -> "Interrupts":
        self._previous = _swap(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        _swap(self._previous)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let the handler that was there before serve: while a consumer's code runs."""
        _swap(self._previous)
        try:
            yield
        finally:
            self._previous = _swap(self._receive)

    def check(self) -> None:
        """Deliver an interrupt that was held back."""
        if self._received:
            self._received = False
            with self.open():
                signal.raise_signal(signal.SIGINT)


def _swap(handler: Any) -> Any:
    """Install a handler and return the one before; None where there is nothing to install."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        return None
    previous = signal.getsignal(signal.SIGINT)
    # None is a handler that Python did not install and could not put back: left alone.
    if previous is not None:
        signal.signal(signal.SIGINT, handler)
    return previous
