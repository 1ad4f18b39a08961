"""Run the mixers of recurrent layers again over the first rows of a verify.

During the verify the arguments of every mixer are kept, and with them the outputs of its linear
and convolution children. After a rejection the old state is put back and each mixer is called
with the kept rows, its children answering from those outputs: projections are not computed again,
MLX computes nothing of what only the mixer's own output needs, and what is left is the recurrence
over the kept rows, in the target's own code.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.target.caches import UNKNOWN, Rule
from dflash_mlx.target.watch import Handler, Watch

# Children whose output row depends on the same input row, or, for a causal convolution, on that
# row and the ones before it.
_ROW_WISE = (nn.Linear, nn.QuantizedLinear, nn.Conv1d)


def row_wise_children(mixer: nn.Module) -> list[nn.Module]:
    """The children of a mixer whose recorded rows can stand in for a new call."""
    found = {id(m): m for m in mixer.modules() if m is not mixer and type(m) in _ROW_WISE}
    return list(found.values())


class Mixers:
    """The recurrent mixers of a target; None where they are not known well enough to run alone."""

    def __init__(self, mixers: list[nn.Module] | None):
        self._mixers = mixers
        self._children = [c for m in mixers or [] for c in row_wise_children(m)]

    def whole(self, rules: Iterable[Rule]) -> bool:
        """Whether a rejection makes the target run again over the kept tokens."""
        return any(rule is UNKNOWN or (rule.replays and self._mixers is None) for rule in rules)

    def replay(self) -> "MixerReplay":
        """A recorder for one verify."""
        return MixerReplay(self._mixers or [], self._children)


class MixerReplay:
    """Records one verify forward's mixer calls and repeats them with fewer rows."""

    def __init__(self, mixers: list[nn.Module], children: list[nn.Module]):
        self._mixers, self._children = mixers, children
        self._seen: set[int] = set()
        self._calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._inside = False
        # id(child) -> (input rows, output) of its calls in order
        self._outputs: dict[int, deque[tuple[int, mx.array]]] = {}

    def handlers(self) -> list[tuple[nn.Module, Handler]]:
        """What to watch during the verify forward."""
        return [(m, self._record_call) for m in self._mixers] + [
            (c, self._record_output) for c in self._children
        ]

    def _record_call(self, call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._seen.add(id(module))
        if self._inside:  # a mixer inside a mixer runs again with the outer one
            return call(module, *args, **kwargs)
        self._calls.append((module, args, kwargs))
        self._inside = True
        try:
            return call(module, *args, **kwargs)
        finally:
            self._inside = False

    def _record_output(self, call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        out = call(module, *args, **kwargs)
        rows = args[0].shape[1] if args and args[0].ndim == 3 and out.ndim == 3 else -1
        self._outputs.setdefault(id(module), deque()).append((rows, out))
        return out

    def _answer(self, call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        recorded = self._outputs.get(id(module))
        if recorded:
            rows, out = recorded.popleft()
            # A convolution gives fewer rows than it gets; by as many as before.
            kept = args[0].shape[1] - (rows - out.shape[1]) if rows >= 0 else 0
            if 0 < kept <= out.shape[1]:
                return out[:, :kept]
        return call(module, *args, **kwargs)

    def run(self, rows: int, kept: int) -> None:
        """Call the recorded mixers with the first `kept` of `rows` rows, 1 <= kept < rows.

        The leaves that the mixers write must be as they were before the verify.

        Raises:
            RuntimeError: a mixer was not called, so that its state cannot be brought back.
        """
        if len(self._seen) < len(self._mixers):
            raise RuntimeError(
                "The target's layers were replaced after it was examined; make its view again."
            )

        def first(value: Any) -> Any:
            if isinstance(value, mx.array) and value.ndim > 1 and value.shape[1] == rows:
                return value[:, :kept]
            return value

        with Watch((c, self._answer) for c in self._children):
            for module, args, kwargs in self._calls:
                module(*(first(a) for a in args), **{k: first(v) for k, v in kwargs.items()})
