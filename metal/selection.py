"""Which implementation serves a call: a kernel where it proved itself, else plain MLX.

DFLASH_MLX_KERNELS says which kernels may run: `off` none; `auto`, the default, those proved
right and faster than plain MLX on this machine; `on` those proved right. Until the proof of a
shape class has ended, in the background, plain MLX serves it.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .catalogue import KERNELS, USES
from .prover import Prover
from .shape_class import Implementation, ShapeClass
from .verdicts import Verdict, VerdictBook, book_path

log = logging.getLogger("dflash_mlx.metal")

VARIABLE = "DFLASH_MLX_KERNELS"
MODES = ("off", "auto", "on")

# Why a kernel gives way, after "The kernel".
REASONS = {
    "wrong": "gave wrong results",
    "failed": "does not run",
    "stalled": "stalled",
    "slower": "is no faster than plain MLX",
}


def mode_from_environment() -> str:
    """The value of DFLASH_MLX_KERNELS.

    Raises:
        ValueError: it is unknown.
    """
    mode = os.environ.get(VARIABLE, "auto").lower() or "auto"
    if mode not in MODES:
        raise ValueError(f"{VARIABLE} is {mode!r}; use off, auto or on.")
    return mode


def gpu_ready() -> bool:
    """Whether Metal kernels can run, and operations go to the GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


class Selection:
    """Chooses between kernels and plain MLX, call by call.

    Attributes:
        uses: what kernels may be used for, of catalogue.USES.
        ready, make (mx.fast.metal_kernel), book, prover: can be replaced, so that something else
            stands in for the GPU.
    """

    def __init__(
        self,
        mode: str | None = None,
        ready: Callable[[], bool] = gpu_ready,
        make: Callable[..., Any] = mx.fast.metal_kernel,
        book: VerdictBook | None = None,
        prover: Prover | None = None,
        uses: Iterable[str] = USES,
    ) -> None:
        self.mode = mode_from_environment() if mode is None else mode
        self.ready = ready
        self.prover = prover or Prover()
        self.uses = frozenset(uses)
        self._make = make
        self._kernels: dict[str, Implementation] = {}
        self._book = book
        self._asked: set[ShapeClass] = set()
        self._said: set[ShapeClass] = set()

    @property
    def book(self) -> VerdictBook:
        """This machine's verdicts; looked for on first use, since that asks the system."""
        if self._book is None:
            self._book = VerdictBook(book_path())
        return self._book

    def variant(self, mode: str, uses: Iterable[str] = USES) -> "Selection":
        """A selection of another mode or for fewer uses, over the same verdicts and proofs."""
        other = Selection(mode, self.ready, self._make, self.book, self.prover, uses)
        other._kernels, other._asked, other._said = self._kernels, self._asked, self._said
        return other

    @contextmanager
    def used(self) -> Iterator[None]:
        """For the length of a `with` block, let every call ask this selection."""
        before = use(self)
        try:
            yield
        finally:
            use(before)

    def active(self, use: str) -> bool:
        """Whether kernels may run here for this use at all."""
        return self.mode != "off" and use in self.uses and self.ready()

    def kernel_for(self, shape: ShapeClass | None) -> Implementation | None:
        """The kernel that serves calls of this class now; None for plain MLX.

        The first question for a class that has no verdict starts its proof in the background.
        """
        if shape is None or not self.active(shape.use):
            return None
        verdict = self.book.get(shape.key)
        if verdict is None:
            if shape not in self._asked:
                self._asked.add(shape)
                self.prover.request(shape, self.record)
            return None
        if verdict.outcome == "faster" or (self.mode == "on" and verdict.correct):
            kernel = self._kernels.get(shape.kernel)
            if kernel is None:
                kernel = self._kernels[shape.kernel] = KERNELS[shape.kernel](self._make)
            return kernel
        if not verdict.correct:
            self._give_way(shape, verdict)
        return None

    def record(self, shape: ShapeClass, verdict: Verdict) -> None:
        """Keep the verdict of a proof, and say so if the kernel gives way because of it."""
        if verdict.outcome != "faster" and (verdict.outcome != "slower" or self.mode != "on"):
            self._give_way(shape, verdict)  # said before anyone can know it
        self.book.put(shape.key, verdict)

    def _give_way(self, shape: ShapeClass, verdict: Verdict) -> None:
        if shape in self._said:
            return
        self._said.add(shape)
        detail = f" ({verdict.detail})" if verdict.detail else ""
        log.log(
            # That MLX is as fast for some shapes is what a proof is for, and no news.
            logging.INFO if verdict.outcome == "slower" else logging.WARNING,
            "The kernel %s %s here for %s%s; plain MLX runs instead.",
            shape.kernel,
            REASONS[verdict.outcome],
            shape.key,
            detail,
        )


_current: Selection | None = None


def current() -> Selection:
    """The selection that every call asks, made on first use."""
    global _current
    if _current is None:
        _current = Selection()
    return _current


def use(selection: Selection | None) -> Selection | None:
    """Let every call ask this selection, or with None a new one; returns the one before."""
    global _current
    before, _current = _current, selection
    return before
