"""Record the outputs of some layers during one forward."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.target.watch import Handler, Listener, own_handle


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
        """`stream_axis` is the axis of a layer's residual streams, where the family has any."""
        self._layers = {id(layer): layer for layer, _ in (layer_calls[tap] for tap in taps)}
        calls = [i for i, (layer, _) in enumerate(layer_calls) if id(layer) in self._layers]
        self._count = len(calls)
        self._wanted = [calls.index(tap) for tap in taps]
        self._stream_axis = stream_axis

    def watching(
        self, outputs: list[mx.array], others: list[tuple[nn.Module, Handler]]
    ) -> list[tuple[nn.Module, Listener]]:
        """What to watch so that `outputs` is filled, and others; where both want a module, both."""
        pairs: list[tuple[nn.Module, Listener]]
        pairs = [(layer, outputs) for layer in self._layers.values()]
        for module, handler in others:
            both = id(module) in self._layers
            pairs.append((module, _both(handler, outputs) if both else handler))
        return pairs

    def pick(self, outputs: list[mx.array]) -> tuple[mx.array, ...]:
        """The taps' outputs in their order, [B, L, H] each, of all that were recorded."""
        if len(outputs) != self._count:
            raise RuntimeError(
                "The target's layers were replaced after it was examined; make its view again."
            )
        picked = [outputs[i] for i in self._wanted]
        if self._stream_axis is not None:
            picked = [o.mean(axis=self._stream_axis) for o in picked]
        return tuple(picked)


def _both(handler: Handler, outputs: list[mx.array]) -> Handler:
    def handle(call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        out = handler(call, module, args, kwargs)
        outputs.append(own_handle(out))
        return out

    return handle


def joined(outputs: Sequence[mx.array]) -> mx.array:
    """Tapped outputs [B, L, H] as features [B, L, len(outputs) * H]."""
    return outputs[0] if len(outputs) == 1 else mx.concatenate(list(outputs), axis=-1)
