"""Ctrl-C is honoured between cycles, so that no cache is left half-written."""

import signal
import threading
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
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def open(self) -> "_Opening":
        """Let the handler that was there before serve: while a consumer's code runs."""
        return _Opening(self)

    def give_back(self) -> None:
        """Install the handler that was there before."""
        _install(self._previous)

    def take(self) -> None:
        """Install our own, and remember the one that is there now."""
        # None is a handler that Python did not install and could not put back: left alone.
        self._previous = signal.getsignal(signal.SIGINT) if _in_main_thread() else None
        if self._previous is not None:
            _install(self._receive)

    def check(self) -> None:
        """Deliver an interrupt that was held back."""
        if self._received:
            self._received = False
            with self.open():
                signal.raise_signal(signal.SIGINT)


class _Opening:
    def __init__(self, interrupts: Interrupts):
        self._interrupts = interrupts

    def __enter__(self) -> None:
        self._interrupts.give_back()

    def __exit__(self, *_: object) -> None:
        self._interrupts.take()


def _install(handler: Any) -> None:
    if handler is not None and _in_main_thread():
        signal.signal(signal.SIGINT, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
