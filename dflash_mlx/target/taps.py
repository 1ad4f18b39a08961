"""Record the outputs of some layers during one forward."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.target.probe import hidden_state
from dflash_mlx.target.watch import Handler


class TapPlan:
    """Which layer calls a tuple of taps names; made once per tuple."""

    def __init__(self, taps: tuple[int, ...], layer_calls: Sequence[tuple[nn.Module, int]]):
        self.taps = taps
        self.layers: list[nn.Module] = []
        self.slots: dict[int, list[tuple[int, int]]] = {}  # id(layer) -> [(nth call, slot)]
        for slot, tap in enumerate(taps):
            layer, nth = layer_calls[tap]
            if id(layer) not in self.slots:
                self.layers.append(layer)
                self.slots[id(layer)] = []
            self.slots[id(layer)].append((nth, slot))


class TapRecorder:
    """The recorded outputs of one forward; a model with residual streams has them on an axis."""

    def __init__(self, plan: TapPlan, stream_axis: int | None):
        self._plan, self._stream_axis = plan, stream_axis
        self._recorded: list[mx.array | None] = [None] * len(plan.taps)
        self._calls: dict[int, int] = {}
        self._inner: dict[int, Handler] = {}

    def watching(self, others: list[tuple[nn.Module, Handler]]) -> list[tuple[nn.Module, Handler]]:
        """The pairs to watch: the tapped layers, and others; where both want a module, both."""
        slots = self._plan.slots
        self._inner = {id(m): handler for m, handler in others if id(m) in slots}
        pairs: list[tuple[nn.Module, Handler]] = [p for p in others if id(p[0]) not in slots]
        pairs.extend((layer, self._record) for layer in self._plan.layers)
        return pairs

    def _record(self, call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        key = id(module)
        inner = self._inner.get(key) if self._inner else None
        out = inner(call, module, args, kwargs) if inner else call(module, *args, **kwargs)
        nth = self._calls.get(key, 0)
        self._calls[key] = nth + 1
        for wanted, slot in self._plan.slots[key]:
            if wanted == nth:
                # A handle of its own: gemma3n writes into the output later.
                self._recorded[slot] = mx.array(hidden_state(out))
        return out

    def outputs(self) -> tuple[mx.array, ...]:
        """The recorded outputs in the order of the taps, [B, L, H] each."""
        outs = [o for o in self._recorded if o is not None]
        if len(outs) < len(self._recorded):
            raise RuntimeError(
                "The target's layers were replaced after it was examined; make its view again."
            )
        if self._stream_axis is not None:
            outs = [o.mean(axis=self._stream_axis) for o in outs]
        return tuple(outs)


def joined(outputs: Sequence[mx.array]) -> mx.array:
    """Tapped outputs [B, L, H] as features [B, L, len(outputs) * H]."""
    return outputs[0] if len(outputs) == 1 else mx.concatenate(list(outputs), axis=-1)
