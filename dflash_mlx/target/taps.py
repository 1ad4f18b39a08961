"""A target's forward that gives the outputs of some layers, too."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.errors import PairError
from dflash_mlx.target.leaf import Leaf
from dflash_mlx.target.watch import Handler, Listener, Watch, Watched, own_handle

# Context features: the output [B, L, H] of each tap, in the order of the taps.
Features = tuple[mx.array, ...]


class TappedForward:
    """The forward of one model."""

    def __init__(
        self,
        model: nn.Module,
        layer_calls: Sequence[tuple[nn.Module, int]],
        stream_axis: int | None,
    ):
        """`layer_calls` and `stream_axis` are what `examine` found."""
        self.model = model
        self._layer_calls, self._stream_axis = layer_calls, stream_axis
        self._plans: dict[tuple[int, ...], TapPlan] = {}

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Leaf],
        taps: Sequence[int] = (),
        handlers: Sequence[tuple[Watched, Handler]] = (),
    ) -> tuple[mx.array, Features]:
        """Run tokens behind what the cache holds; nothing is evaluated.

        Args:
            tokens: [B, L].
            cache: extended in place.
            taps: the layers whose outputs are wanted.
            handlers: of further modules to watch.

        Returns:
            Logits [B, L, V], and one array [B, L, H] per tap.

        Raises:
            PairError: a tap is not a layer of this target.
        """
        if not taps:
            if not handlers:
                return self.model(tokens, cache=cache), ()
            with Watch(handlers):
                return self.model(tokens, cache=cache), ()
        plan, outputs = self._plan(tuple(taps)), list[mx.array]()
        with Watch(plan.watching(outputs, handlers)):
            logits = self.model(tokens, cache=cache)
        return logits, plan.pick(outputs)

    def check_taps(self, taps: Sequence[int]) -> None:
        """Raise PairError if a tap is not a layer of this target."""
        depth = len(self._layer_calls)
        for tap in taps:
            if not -1 <= tap < depth:
                raise PairError(
                    f"The draft taps layer {tap} of a target that has layers 0 to {depth - 1}; "
                    "use the target that the draft was trained for."
                )

    def _plan(self, taps: tuple[int, ...]) -> "TapPlan":
        plan = self._plans.get(taps)
        if plan is None:
            self.check_taps(taps)
            plan = self._plans[taps] = TapPlan(taps, self._layer_calls, self._stream_axis)
        return plan


class TapPlan:
    """Which layer calls a tuple of taps names; made once per tuple.

    All calls of the tapped layers are recorded, in their order, which in a looped model are more
    than the taps.
    """

    def __init__(
        self,
        taps: tuple[int, ...],
        layer_calls: Sequence[tuple[nn.Module, int]],
        stream_axis: int | None,
    ):
        """`stream_axis` is the axis of a layer's residual streams, where the family has any.

        Tap -1 is what the first layer is called with: the embedding's output.
        """
        called = [layer_calls[tap] for tap in taps if tap >= 0]
        self._layers = {id(layer): layer for layer, _ in called}
        self._first = layer_calls[0][0] if -1 in taps else None
        calls = [i for i, (layer, _) in enumerate(layer_calls) if id(layer) in self._layers]
        if self._first is not None:
            calls.insert(0, -1)
        self._count = len(calls)
        self._wanted = [calls.index(tap) for tap in taps]
        self._stream_axis = stream_axis

    def watching(
        self, outputs: list[mx.array], others: Sequence[tuple[Watched, Handler]]
    ) -> list[tuple[Watched, Listener]]:
        """What to watch so that `outputs` is filled, and others; where both want a module, both."""
        pairs: list[tuple[Watched, Listener]]
        pairs = [(layer, outputs) for layer in self._layers.values() if layer is not self._first]
        taken = {id(module): handler for module, handler in others}
        if self._first is not None:
            tapped = id(self._first) in self._layers
            pairs.append(
                (self._first, _entering(outputs, tapped, taken.pop(id(self._first), None)))
            )
        for module, handler in others:
            if id(module) in taken:
                both = id(module) in self._layers
                pairs.append((module, _both(handler, outputs) if both else handler))
        return pairs

    def pick(self, outputs: list[mx.array]) -> Features:
        """The taps' outputs, of all that were recorded."""
        if len(outputs) != self._count:
            raise RuntimeError(
                "The target's layers were replaced after it was examined; make its view again."
            )
        picked = [outputs[i] for i in self._wanted]
        if self._stream_axis is not None:
            # The embedding's output has no streams yet.
            picked = [o.mean(axis=self._stream_axis) if o.ndim > 3 else o for o in picked]
        return tuple(picked)


def _entering(outputs: list[mx.array], tapped: bool, inner: Handler | None) -> Handler:
    """A handler of the first layer: what enters its first call, and its outputs if tapped."""
    if tapped:
        inner = _both(inner or _pass, outputs)

    def handle(call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not outputs:
            outputs.append(own_handle([*args, *kwargs.values()]))
        return (inner or _pass)(call, module, args, kwargs)

    return handle


def _pass(call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return call(module, *args, **kwargs)


def _both(handler: Handler, outputs: list[mx.array]) -> Handler:
    def handle(call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        out = handler(call, module, args, kwargs)
        outputs.append(own_handle(out))
        return out

    return handle
