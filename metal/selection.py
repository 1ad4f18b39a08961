"""Which implementation serves a call of block_attention: the kernel where it proved itself.

DFLASH_MLX_KERNELS says which kernels may run: `off` none; `auto`, the default, those proved
right and faster than plain MLX on this machine; `on` those proved right. Until the proof of a
shape class has ended, in the background, plain MLX serves it.
"""

import logging
import os
from collections.abc import Callable

import mlx.core as mx

from .attention_kernel import AttentionKernel, supported
from .attention_plain import first_visible, plain_block_attention
from .prover import Prover
from .shape_class import ShapeClass, shape_class
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
    """The value of DFLASH_MLX_KERNELS. Raises ValueError for an unknown one."""
    mode = os.environ.get(VARIABLE, "auto").lower() or "auto"
    if mode not in MODES:
        raise ValueError(f"{VARIABLE} is {mode!r}; use off, auto or on.")
    return mode


def gpu_ready() -> bool:
    """Whether Metal kernels can run, and operations go to the GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


class Selection:
    """Chooses between the kernel and plain MLX, call by call.

    ready, kernel, book and prover can be replaced, so that something else stands in for the GPU.
    """

    def __init__(
        self,
        mode: str | None = None,
        ready: Callable[[], bool] = gpu_ready,
        kernel: Callable[..., mx.array] | None = None,
        book: VerdictBook | None = None,
        prover: Prover | None = None,
    ) -> None:
        self.mode = mode_from_environment() if mode is None else mode
        self.ready = ready
        self.prover = prover or Prover()
        self._kernel = kernel
        self._book = book
        self._asked: set[ShapeClass] = set()
        self._said: set[ShapeClass] = set()

    @property
    def book(self) -> VerdictBook:
        """This machine's verdicts; looked for on first use, since that asks the system."""
        if self._book is None:
            self._book = VerdictBook(book_path())
        return self._book

    @property
    def kernel(self) -> Callable[..., mx.array]:
        """The kernel's wrapper."""
        if self._kernel is None:
            self._kernel = AttentionKernel()
        return self._kernel

    def choose(
        self,
        queries: mx.array,
        context_keys: mx.array,
        context_values: mx.array,
        block_keys: mx.array | None,
        block_values: mx.array | None,
        *,
        context_length: int,
        context_start: int,
        window: int | None,
    ) -> Callable[..., mx.array]:
        """The implementation for a call with these arrays, shaped as in block_attention."""
        if self.mode == "off" or not self.ready():
            return plain_block_attention
        if not supported(queries, context_keys, context_values, block_keys, block_values):
            return plain_block_attention
        seen = context_length - first_visible(context_length, context_start, window)
        shape = shape_class(queries, context_keys.shape[1], seen)
        if shape is None:
            return plain_block_attention
        verdict = self.book.get(shape.key)
        if verdict is None:
            if shape not in self._asked:
                self._asked.add(shape)
                self.prover.request(shape, self.record)
            return plain_block_attention
        if verdict.outcome == "faster" or (self.mode == "on" and verdict.correct):
            return self.kernel
        if not verdict.correct:
            self._give_way(shape, verdict)
        return plain_block_attention

    def record(self, shape: ShapeClass, verdict: Verdict) -> None:
        """Keep the verdict of a proof, and say so if the kernel gives way because of it."""
        self.book.put(shape.key, verdict)
        if verdict.outcome == "slower" and self.mode == "on":
            return
        if verdict.outcome != "faster":
            self._give_way(shape, verdict)

    def _give_way(self, shape: ShapeClass, verdict: Verdict) -> None:
        if shape in self._said:
            return
        self._said.add(shape)
        detail = f" ({verdict.detail})" if verdict.detail else ""
        log.warning(
            "The attention kernel %s here for %s%s; plain MLX runs instead.",
            REASONS[verdict.outcome],
            shape.key,
            detail,
        )


_current: Selection | None = None


def current() -> Selection:
    """The selection that block_attention asks, made on first use."""
    global _current
    if _current is None:
        _current = Selection()
    return _current


def use(selection: Selection | None) -> Selection | None:
    """Let block_attention ask this selection, or with None a new one; returns the one before."""
    global _current
    before, _current = _current, selection
    return before
