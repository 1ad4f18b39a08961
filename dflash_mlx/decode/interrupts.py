"""Ctrl-C is honoured between cycles, so that no cache is left half-written."""

import ctypes
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupts:
    """Holds SIGINT back inside `with`, except inside `with interrupts.open()`.

    Python delivers signals to its main thread only, so in any other this does nothing. A
    generation that was begun in the main thread may end in another.
    """

    def __init__(self) -> None:
        self._received = self._holding = self._over = False
        self._previous: Any = None
        self._opening = _Opening(self)

    def __enter__(self) -> "Interrupts":
        # None is a handler that Python did not install and could not put back: left alone.
        self._previous = signal.getsignal(signal.SIGINT) if _in_main_thread() else None
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._receive)
        self.hold(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.hold(False)
        self._over = True
        if _in_main_thread():
            self._uninstall()
        elif self._previous is not None:
            _in_main_thread_soon(self._uninstall)
        if kind is None or kind is GeneratorExit:
            self.check()

    def _uninstall(self) -> None:
        # A consumer that put its own handler there meanwhile keeps it.
        if signal.getsignal(signal.SIGINT) == self._receive:
            signal.signal(signal.SIGINT, self._before())

    def open(self) -> "_Opening":
        """Let the handler that was there before serve: while a consumer's code runs.

        Ours stays installed and passes on, as installing takes long for something done per token.
        """
        return self._opening

    def hold(self, holding: bool) -> None:
        """Hold interrupts back from now on, or let them through."""
        self._holding = holding and _in_main_thread()

    def check(self) -> None:
        """Deliver an interrupt that was held back."""
        if self._received:
            self._received = False
            with self.open():
                self._pass_on(signal.SIGINT, None)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._holding:
            self._received = True
        else:
            self._pass_on(signum, frame)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        handler = self._before()
        if callable(handler):
            handler(signum, frame)
        elif handler == signal.SIG_DFL:
            signal.signal(signum, handler)
            signal.raise_signal(signum)

    def _before(self) -> Any:
        """The handler before ours, those of generations that ended in between left out."""
        handler = self._previous
        while isinstance(owner := getattr(handler, "__self__", None), Interrupts) and owner._over:
            handler = owner._previous
        return handler


class _Opening:
    def __init__(self, interrupts: Interrupts):
        self._interrupts = interrupts

    def __enter__(self) -> None:
        self._interrupts.hold(False)

    def __exit__(self, *_: object) -> None:
        self._interrupts.hold(True)


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


_PENDING = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_pending: list[object] = []  # what ctypes must not lose before it was called


def _in_main_thread_soon(call: Callable[[], None]) -> None:
    """Let the main thread call this between two of its own steps: only it may change handlers."""

    def now(_: object) -> int:
        _pending.remove(callback)
        call()
        return 0

    callback = _PENDING(now)
    _pending.append(callback)
    # Fails where 32 calls are pending; the handler then stays, and passes on what it gets.
    if ctypes.pythonapi.Py_AddPendingCall(callback, None):
        _pending.remove(callback)
