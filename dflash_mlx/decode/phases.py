"""Where the host's time in the decode loop goes; costs next to nothing while nobody asks."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Phases:
    """Seconds by phase. A phase inside another stops the outer one's watch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        """A phase begins."""
        self._mark()
        self._open.append(name)

    def leave(self) -> None:
        """The innermost phase ends."""
        self._mark()
        if self._open:
            self._open.pop()

    def restart(self) -> None:
        """Forget what was counted."""
        self.seconds.clear()
        self._since = time.perf_counter()

    def _mark(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class phase:
    """Counts a function or a `with` block as a phase, while `recording` is on."""

    recorder: Phases | None = None

    def __init__(self, name: str):
        self.name = name

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            if phase.recorder is None:
                return function(*args, **kwargs)
            with self:
                return function(*args, **kwargs)

        return counted

    def __enter__(self) -> None:
        if phase.recorder is not None:
            phase.recorder.enter(self.name)

    def __exit__(self, *_: object) -> None:
        if phase.recorder is not None:
            phase.recorder.leave()


@contextmanager
def recording() -> Iterator[Phases]:
    """Record the phases of every generation that runs inside."""
    before, phase.recorder = phase.recorder, Phases()
    try:
        yield phase.recorder
    finally:
        phase.recorder = before
