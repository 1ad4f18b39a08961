"""Run one lazy forward of a model and note what every module was given and gave.

The graph that the forward builds is dropped, not evaluated.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from dflash_mlx.target.leaf import leaves
from dflash_mlx.target.watch import Watch, hidden_state, is_callable

PROBE_TOKENS = 5
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass
class Call:
    """One call of a module."""

    module: nn.Module
    inputs: list[mx.array]
    output: Any
    innermost: bool
    layer: bool
    finished: int  # position in the order in which calls finished


@dataclass
class _Frame:
    module: nn.Module
    leaf_ids: set[int]
    children: int = 0


def _leaf_ids(args: Any) -> Iterator[int]:
    """Identities of the cache objects among call arguments, containers opened."""
    for a in args:
        if isinstance(a, (list, tuple)):
            yield from _leaf_ids(a)
        elif hasattr(a, "caches"):
            yield from _leaf_ids(a.caches)
        elif a is not None and not isinstance(a, (mx.array, nn.Module, str, int, float)):
            yield id(a)


@dataclass
class Probe:
    """What one watched forward saw; itself the handler of every watched module.

    `writers` are the modules that assigned a recurrent cache's slots, `unclear` whether some
    assignment could not be attributed to a module that was given just that cache.
    """

    layers: set[int]
    leaf_ids: set[int]
    tokens: mx.array = field(default_factory=lambda: mx.zeros((1, 0)))
    logits: mx.array = field(default_factory=lambda: mx.zeros((1, 0, 0)))
    calls: list[Call] = field(default_factory=list)
    stack: list[_Frame] = field(default_factory=list)
    writers: dict[int, nn.Module] = field(default_factory=dict)
    written: set[tuple[int, int]] = field(default_factory=set)
    unclear: bool = False

    def __call__(self, call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        frame = _Frame(module, self.leaf_ids.intersection(_leaf_ids(values)))
        if self.stack:
            self.stack[-1].children += 1
        self.stack.append(frame)
        try:
            # Handles of their own: some models write into a layer's output afterwards.
            inputs = [copy(v) for v in values if isinstance(v, mx.array)]
            output = call(module, *args, **kwargs)
        finally:
            self.stack.pop()
        seen = hidden_state(output)
        self.calls.append(
            Call(
                module,
                inputs,
                copy(seen) if isinstance(seen, mx.array) else None,
                frame.children == 0,
                id(module) in self.layers,
                len(self.calls),
            )
        )
        return output

    def wrote(self, leaf: Any, slot: int) -> None:
        """A slot of a recurrent cache was assigned: by the innermost module that was given it."""
        holder = next((f for f in reversed(self.stack) if id(leaf) in f.leaf_ids), None)
        if holder is None or holder.leaf_ids != {id(leaf)}:
            self.unclear = True
            return
        self.writers[id(holder.module)] = holder.module
        self.written.add((id(leaf), slot))


def _spy_on(leaf: ArraysCache, probe: Probe) -> None:
    cls = type(leaf)

    def __setitem__(self: Any, slot: int, value: Any) -> None:
        probe.wrote(self, slot)
        cls.__setitem__(self, slot, value)

    leaf.__class__ = type(cls.__name__, (cls,), {"__setitem__": __setitem__})


def run_probe(model: nn.Module, layers: list[nn.Module]) -> Probe:
    """Watch every module of a model during one forward of a few different tokens."""
    cache = make_prompt_cache(model)
    found = leaves(cache)
    recurrent = [c for c in found if type(c) is ArraysCache]
    probe = Probe({id(layer) for layer in layers}, {id(c) for c in found})
    for leaf in recurrent:
        _spy_on(leaf, probe)
    modules = [m for m in model.modules() if m is not model and is_callable(m)]
    unique = list({id(m): m for m in modules}.values())
    # From all over the vocabulary, past the unused rows that tend to be alike: a norm on the
    # embedding then shows as a factor that differs by row.
    rows = [m["weight"].shape[0] for m in unique if isinstance(m, _EMBEDDINGS)]
    step = max(min(rows, default=0) // (PROBE_TOKENS + 2), 1)
    probe.tokens = mx.arange(step, step * (PROBE_TOKENS + 1), step)[None]
    with Watch((m, probe) for m in unique):
        probe.logits = model(probe.tokens, cache=cache)
    filled = {(id(c), i) for c in recurrent for i, s in enumerate(c.cache) if s is not None}
    probe.unclear |= not filled <= probe.written
    return probe
