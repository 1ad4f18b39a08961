"""Find the parts of an mlx-lm model by what its modules do in one forward.

What is called with the tokens is the embedding, what writes into a recurrent cache is its mixer,
what produces the logits is the head: no family is known by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import gather_last_axis

from dflash_mlx.errors import UnsupportedTarget
from dflash_mlx.target.probe import Call, Probe, run_probe


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


def examine(model: nn.Module) -> Anatomy:
    """Watch one lazy forward of an mlx-lm model and name its parts.

    Raises:
        UnsupportedTarget: a part cannot be found; it says why.
    """
    family = str(getattr(model, "model_type", None) or type(model).__name__)
    layers = getattr(model, "layers", None)
    if not isinstance(layers, (list, tuple)) or not layers:
        raise UnsupportedTarget(
            f"{family} has no list of layers that context features could be taken from."
        )
    try:
        probe = run_probe(model, list(layers))
    except Exception as error:
        raise UnsupportedTarget(
            f"{family} could not run a few tokens with its own prompt cache: {error}."
        ) from error
    calls = _layer_calls(probe, list(layers), family)
    first, last = calls[0][0], calls[-1][0]
    axis = _stream_axis(probe, [c for c, _ in calls], family)
    embedding = _find_embedding(probe, family)
    return Anatomy(
        embedding=embedding,
        embed_scale=_embed_scale(first, embedding, probe.tokens),
        head=_find_head(probe, last.finished, embedding, family),
        layer_calls=[(c.module, nth) for c, nth in calls],
        hidden_size=first.output.shape[-1],
        vocab_size=embedding["weight"].shape[0],
        streams=1 if axis is None else first.output.shape[axis],
        stream_axis=axis,
        mixers=None if probe.unclear else list(probe.writers.values()),
    )


def _layer_calls(probe: Probe, layers: list[nn.Module], family: str) -> list[tuple[Call, int]]:
    """Calls of layers in their order, each with how often its layer was called before."""
    calls: list[tuple[Call, int]] = []
    seen: dict[int, int] = {}
    for c in probe.calls:
        if c.layer:
            nth = seen.get(id(c.module), 0)
            seen[id(c.module)] = nth + 1
            calls.append((c, nth))
    if not calls:
        raise UnsupportedTarget(
            f"{family} runs the insides of its layers without calling the layers, "
            "so no context features can be taken from them."
        )
    # Layers at the end may serve something else (predicting further tokens); a gap or another
    # order would make a tap's number ambiguous.
    listed = list(dict.fromkeys(id(layer) for layer in layers))
    if list(seen) != listed[: len(seen)]:
        raise UnsupportedTarget(
            f"{family} does not call its layers in the order in which it lists them, "
            "so it is unclear which layer a draft's tap means."
        )
    return calls


def _stream_axis(probe: Probe, calls: list[Call], family: str) -> int | None:
    """Where parallel residual streams lie in a layer's output; None for [B, L, H]."""
    shapes = {None if c.output is None else c.output.shape for c in calls}
    batch_and_rows = probe.tokens.shape
    if len(shapes) == 1 and (shape := shapes.pop()) is not None:
        if len(shape) == 3 and shape[:2] == batch_and_rows:
            return None
        if len(shape) == 4 and shape[:2] == batch_and_rows:
            return 2
        if len(shape) == 4 and shape[1:3] == batch_and_rows:
            return 0
    raise UnsupportedTarget(
        f"{family} passes something between its layers that is not one hidden state per token, "
        "so no context features can be taken from it."
    )


def _find_embedding(probe: Probe, family: str) -> nn.Module:
    for c in probe.calls:
        if (
            c.innermost
            and c.inputs
            and c.inputs[0].shape == probe.tokens.shape
            and mx.issubdtype(c.inputs[0].dtype, mx.integer)
            and c.output is not None
            and c.output.ndim == 3
            and "weight" in c.module
        ):
            return c.module
    raise UnsupportedTarget(
        f"{family} has no module that embeds the tokens, so a draft has no input."
    )


def _find_head(
    probe: Probe, last_layer: int, embedding: nn.Module, family: str
) -> Callable[[mx.array], mx.array]:
    vocab = probe.logits.shape[-1]
    for c in reversed(probe.calls):
        if c.finished <= last_layer:
            break
        weight, group = c.module.get("weight"), getattr(c.module, "group", None)
        if not isinstance(group, mx.distributed.Group):
            group = None
        parts = group.size() if group else 1
        if (
            c.innermost
            and c.output is not None
            and c.output.shape[-1] * parts == vocab
            and weight is not None
            and weight.ndim > 1
        ):
            # mlx-lm splits some heads over the ranks of a group, each a slice of the vocabulary.
            return _gathered(c.module, group) if group else c.module
    # A tied head is the embedding's own method, which no watch sees.
    if hasattr(embedding, "as_linear") and embedding["weight"].shape[0] == vocab:
        return embedding.as_linear
    raise UnsupportedTarget(
        f"{family} makes its logits without an output head that a draft could borrow."
    )


def _gathered(head: nn.Module, group: mx.distributed.Group) -> Callable[[mx.array], mx.array]:
    """A head of which each rank of a group holds a part: all of its logits, in every rank."""
    return lambda hidden: gather_last_axis(head(hidden), group)


def _embed_scale(first: Call, embedding: nn.Module, tokens: mx.array) -> float:
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
    along, squares = (fed * raw).sum(-1).tolist(), (raw * raw).sum(-1).tolist()
    ratios = [a / s for a, s in zip(along, squares, strict=True) if s > 0]
    if not ratios:
        return 1.0
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
