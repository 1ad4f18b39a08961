"""One person's messages in all ranks: rank 0 reads them, and tells the others."""

import os
import select
import signal
import sys
import time
from types import FrameType
from typing import Any

from dflash_mlx.cli.line_input import Typed, unfinished, without_fences
from dflash_mlx.cli.screen import err
from dflash_mlx.distributed import Ranks

# What rank 0 tells: that there is a message, or why there is none.
_WAITING, _TYPED, _FENCED, _END, _INTERRUPTED, _UNREADABLE = range(6)

# Seconds between two meetings of the ranks while nothing is typed. A rank that waits in MLX looks
# again and again, one that sleeps takes nothing; and so it is noticed when another is gone.
PAUSE = 0.1


class SharedInput:
    """What rank 0 gets on stdin, in every rank.

    Inside `with`, a Ctrl-C that interrupts no answer is told like a message, so that it reaches all
    ranks at the same place.

    Attributes:
        interactive: whether a person sits at rank 0's terminal.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self.interactive = bool(ranks.told([sys.stdin.isatty()])[0])
        self._messages = _Messages()
        self._interrupted = False
        self._before: Any = None

    def __enter__(self) -> "SharedInput":
        if self._ranks.leads:
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ranks.leads:
            signal.signal(signal.SIGINT, self._before)

    def read(self) -> Typed:
        """As `Input.read`, in every rank."""
        if self._ranks.leads:
            err.print("> ", end="")
        code, text = self._look()
        while (code := self._ranks.told([code])[0]) == _WAITING:
            code, text = self._look()
        if code == _END:
            raise EOFError
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code == _UNREADABLE:
            raise UnicodeError
        return Typed(self._ranks.told_text(text), fenced=code == _FENCED)

    def _look(self) -> tuple[int, str]:
        """What there is by now to tell, and its text; the other ranks wait."""
        if not self._ranks.leads:
            time.sleep(PAUSE)
            return _WAITING, ""
        try:
            typed = self._messages.next(PAUSE)
        except EOFError:
            return _END, ""
        except UnicodeError:
            return _UNREADABLE, ""
        if self._interrupted:
            self._interrupted = False
            return _INTERRUPTED, ""
        if typed is None:
            return _WAITING, ""
        return _FENCED if typed.fenced else _TYPED, typed.text

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._interrupted = True


class _Messages:
    """Messages on stdin as they come; Python's own reader could only be waited for."""

    def __init__(self) -> None:
        self._rest = b""  # of a line that has not ended
        self._lines: list[bytes] = []
        self._open: list[str] = []  # lines of a message that is not finished
        self._ended = False

    def next(self, seconds: float) -> Typed | None:
        """A message, if there is one within so long; EOFError behind the last one."""
        if not self._lines and not self._ended:
            self._take(seconds)
        while self._lines:
            self._open.append(self._lines.pop(0).decode().removesuffix("\r"))
            if not unfinished(message := "\n".join(self._open)):
                self._open = []
                return without_fences(message)
        if self._ended:
            raise EOFError
        return None

    def _take(self, seconds: float) -> None:
        file = sys.stdin.fileno()
        if not select.select([file], [], [], seconds)[0]:
            return
        data = os.read(file, 1 << 16)
        self._ended = not data
        *self._lines, self._rest = (self._rest + data).split(b"\n")
        if self._ended and self._rest:
            self._lines, self._rest = [self._rest], b""
