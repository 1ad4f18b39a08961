"""Find the parts of an mlx-lm model by watching one lazy forward.

The forward builds MLX's graph over a few tokens and is never evaluated, except for the first
layer's input (an embedding of those tokens). What is called with the tokens is the embedding,
what writes into a recurrent cache is its mixer, what produces the logits is the head: no family
is known by name.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from dflash_mlx.errors import UnsupportedTarget
from dflash_mlx.target.caches import leaves
from dflash_mlx.target.watch import Watch, is_callable

PROBE_TOKENS = 5


@dataclass
class Anatomy:
    """Where DFlash finds what it needs in a target."""

    embedding: nn.Module
    embed_scale: float
    head: Callable[[mx.array], mx.array]
    # Layer calls in order: (layer, how often it was called before in the same forward).
    layer_calls: list[tuple[nn.Module, int]]
    hidden_size: int
    vocab_size: int
    # Parallel residual streams in a layer's output and their axis; 1 and None for the usual
    # [B, L, H].
    streams: int
    stream_axis: int | None
    # Modules that write recurrent state, each with its leaf alone; None where the writes could
    # not be told apart, so that the whole target must be replayed.
    mixers: list[nn.Module] | None


@dataclass
class _Call:
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


def hidden_state(output: Any) -> Any:
    """The array in what a layer returned: itself, or the first one of a tuple."""
    if isinstance(output, (tuple, list)):
        return next((o for o in output if isinstance(o, mx.array)), None)
    return output


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
class _Probe:
    """What one watched forward saw."""

    layers: set[int]
    leaf_ids: set[int]
    calls: list[_Call] = field(default_factory=list)
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
            inputs = [mx.array(v) for v in values if isinstance(v, mx.array)]
            output = call(module, *args, **kwargs)
        finally:
            self.stack.pop()
        seen = hidden_state(output)
        self.calls.append(
            _Call(
                module,
                inputs,
                mx.array(seen) if isinstance(seen, mx.array) else None,
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


def _spy_on(leaf: ArraysCache, probe: _Probe) -> None:
    cls = type(leaf)

    def __setitem__(self: Any, slot: int, value: Any) -> None:
        probe.wrote(self, slot)
        cls.__setitem__(self, slot, value)

    leaf.__class__ = type(cls.__name__, (cls,), {"__setitem__": __setitem__})


def _layers_of(model: nn.Module) -> list[nn.Module]:
    layers = getattr(model, "layers", None)
    if not isinstance(layers, (list, tuple)) or not layers:
        raise UnsupportedTarget(
            f"{type(model).__module__.rsplit('.', 1)[-1]} models have no list of layers "
            "that context features could be taken from"
        )
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def _family(model: nn.Module) -> str:
    return str(getattr(model, "model_type", None) or type(model).__name__)


def _find_embedding(probe: _Probe, tokens: mx.array, family: str) -> nn.Module:
    for c in probe.calls:
        if (
            c.innermost
            and c.inputs
            and c.inputs[0].shape == tokens.shape
            and mx.issubdtype(c.inputs[0].dtype, mx.integer)
            and c.output is not None
            and c.output.ndim == 3
            and "weight" in c.module
        ):
            return c.module
    raise UnsupportedTarget(f"{family}: no module embeds the tokens, so a draft has no input")


def _find_head(
    probe: _Probe, last_layer: int, embedding: nn.Module, vocab: int, family: str
) -> Callable[[mx.array], mx.array]:
    for c in reversed(probe.calls):
        if c.finished <= last_layer:
            break
        weight = c.module.get("weight")
        if (
            c.innermost
            and c.output is not None
            and c.output.shape[-1] == vocab
            and weight is not None
            and weight.ndim > 1
        ):
            return c.module
    # A tied head is the embedding's own method, which no watch sees.
    if hasattr(embedding, "as_linear") and embedding["weight"].shape[0] == vocab:
        return embedding.as_linear
    raise UnsupportedTarget(f"{family}: the output head could not be found")


def _embed_scale(probe: _Probe, first: _Call, embedding: nn.Module, tokens: mx.array) -> float:
    """The constant between the raw embedding and the first layer's input, 1 if there is none."""
    raw = embedding(tokens).astype(mx.float32)[0]
    fed = next((a for a in first.inputs if a.shape[-1:] == raw.shape[-1:] and a.ndim >= 3), None)
    if fed is None:
        return 1.0
    if fed.ndim == 4:
        # Parallel streams: [A, B, L, H] starts with the plain one, [B, L, A, H] repeats it.
        fed = fed[0] if fed.shape[1:3] == tokens.shape else fed[:, :, 0]
    fed = fed.astype(mx.float32)[0]
    # The one place where the view waits for the device: a few embedding rows, once per target.
    mx.eval(raw, fed)
    ratios: list[float] = ((fed * raw).sum(-1) / (raw * raw).sum(-1)).tolist()
    scale = sum(ratios) / len(ratios)
    apart: Any = (mx.abs(fed - scale * raw).max() / mx.abs(fed).max()).item()
    spread = max(ratios) - min(ratios)
    if not math.isfinite(scale) or spread > 2e-3 * abs(scale) or apart > 0.02:
        return 1.0
    # Half-precision rows round the ratio; the usual factors are known exactly.
    for exact in (1.0, math.sqrt(raw.shape[-1])):
        if abs(scale / exact - 1) < 4e-3:
            return exact
    return scale


def examine(model: nn.Module) -> Anatomy:
    """Watch one lazy forward of an mlx-lm model and name its parts.

    Raises UnsupportedTarget with the reason when a part cannot be found.
    """
    family = _family(model)
    layers = _layers_of(model)
    cache = make_prompt_cache(model)
    all_leaves = leaves(cache)
    recurrent = [c for c in all_leaves if type(c) is ArraysCache]
    probe = _Probe({id(layer) for layer in layers}, {id(c) for c in all_leaves})
    for leaf in recurrent:
        _spy_on(leaf, probe)
    modules = [m for m in model.modules() if m is not model and is_callable(m)]
    unique = list({id(m): m for m in modules}.values())
    # Different tokens: a norm on the embedding then shows as a factor that differs by row.
    tokens = mx.arange(PROBE_TOKENS)[None]
    with Watch((m, probe) for m in unique):
        logits = model(tokens, cache=cache)

    layer_calls: list[tuple[_Call, int]] = []
    seen: dict[int, int] = {}
    for c in probe.calls:
        if c.layer:
            nth = seen.get(id(c.module), 0)
            seen[id(c.module)] = nth + 1
            layer_calls.append((c, nth))
    if not layer_calls:
        raise UnsupportedTarget(
            f"{family} runs the insides of its layers without calling the layers, "
            "so no context features can be taken from them"
        )
    if len(seen) < len({id(layer) for layer in layers}):
        raise UnsupportedTarget(f"{family} does not call all of its layers in a forward")
    outputs = [c.output for c, _ in layer_calls]
    if any(o is None or o.shape != outputs[0].shape for o in outputs):
        raise UnsupportedTarget(f"{family}: its layers return hidden states of different shapes")

    out = outputs[0]
    if out.ndim == 3 and out.shape[:2] == tokens.shape:
        stream_axis = None
    elif out.ndim == 4 and out.shape[:2] == tokens.shape:
        stream_axis = 2
    elif out.ndim == 4 and out.shape[1:3] == tokens.shape:
        stream_axis = 0
    else:
        raise UnsupportedTarget(
            f"{family}: its layers return arrays of shape {out.shape}, and nothing says which "
            "part is the hidden state"
        )

    embedding = _find_embedding(probe, tokens, family)
    head = _find_head(probe, layer_calls[-1][0].finished, embedding, logits.shape[-1], family)
    filled = {(id(c), i) for c in recurrent for i, s in enumerate(c.cache) if s is not None}
    clear = not probe.unclear and filled <= probe.written
    return Anatomy(
        embedding=embedding,
        embed_scale=_embed_scale(probe, layer_calls[0][0], embedding, tokens),
        head=head,
        layer_calls=[(c.module, nth) for c, nth in layer_calls],
        hidden_size=out.shape[-1],
        vocab_size=embedding["weight"].shape[0],
        streams=1 if stream_axis is None else out.shape[stream_axis],
        stream_axis=stream_axis,
        mixers=list(probe.writers.values()) if clear else None,
    )
