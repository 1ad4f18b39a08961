"""Masked-block attention: one block of queries over a cached context and over itself."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from . import selection
from .attention_class import attention_class
from .attention_kernel import supported
from .attention_plain import first_visible, plain_block_attention
from .shape_class import Implementation


def block_attention(
    queries: mx.array,
    context_keys: mx.array,
    context_values: mx.array,
    block_keys: mx.array | None = None,
    block_values: mx.array | None = None,
    *,
    context_length: int,
    context_start: int = 0,
    window: int | None = None,
    visible: mx.array | str | None = None,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of a block's L rows over the context in a cache buffer and over the block.

    Which implementation runs, `selection` decides; a gradient is always that of plain MLX.

    Args:
        queries: [B, Hq, L, D].
        context_keys, context_values: [B, Hkv, capacity, D], read in place; rows from
            context_length on are ignored, except for a block that lies there.
        block_keys, block_values: [B, Hkv, L, D], or both None when the block's keys and values
            already lie in the buffers at context_length ... context_length + L.
        context_length: how many buffer rows are context.
        context_start: the first of them that may be seen.
        window: row i sees buffer row j only if context_length + i - j < window.
        visible: [L, L] bool, row i sees block key j iff visible[i, j]; None means all, and
            "causal" those with j <= i. Every row must see at least one key of context or block.
        sinks: [Hq], a further logit of each head's rows that has no value.

    Returns:
        [B, Hq, L, D].

    Raises:
        ValueError: shapes do not belong together.
    """
    _check(queries, context_keys, context_values, block_keys, block_values, context_length, visible)
    options: dict[str, Any] = {
        "context_length": context_length,
        "context_start": context_start,
        "window": window,
        "visible": visible,
        "scale": scale,
    }
    keys_and_values = {
        "context_keys": context_keys,
        "context_values": context_values,
        "block_keys": block_keys,
        "block_values": block_values,
    }
    given = {name: x for name, x in keys_and_values.items() if x is not None}
    seen = context_length - first_visible(context_length, context_start, window)
    kernel = _kernel(queries, list(given.values()), seen)
    arrays: dict[str, Any] = {"queries": queries, **given}
    if sinks is not None:
        arrays["sinks"] = sinks
    if kernel is None:
        return plain_block_attention(**arrays, **options)
    return _with_plain_gradient(kernel, arrays, options)


def _kernel(queries: mx.array, others: list[mx.array], seen: int) -> Implementation | None:
    chosen = selection.current()
    if not chosen.active("draft") or not supported(queries, *others):
        return None
    return chosen.kernel_for(attention_class("draft", queries, others[0].shape[1], seen))


def _with_plain_gradient(
    attention: Callable[..., mx.array], arrays: dict[str, Any], options: dict[str, Any]
) -> mx.array:
    """A kernel has no gradient: whoever differentiates the call gets that of plain MLX."""

    def named(given: tuple[mx.array, ...]) -> dict[str, Any]:
        return dict(zip(arrays, given, strict=True))

    def attend(*given: mx.array) -> mx.array:
        return attention(**named(given), **options)

    def plain(*given: mx.array) -> mx.array:
        return plain_block_attention(**named(given), **options)

    run: Any = mx.custom_function(attend)

    @run.vjp
    def backward(given: Any, cotangent: mx.array, _: mx.array) -> Any:
        return mx.vjp(plain, given, [cotangent])[1]

    return run(*arrays.values())


def _check(
    queries: mx.array,
    context_keys: mx.array,
    context_values: mx.array,
    block_keys: mx.array | None,
    block_values: mx.array | None,
    length: int,
    visible: mx.array | str | None,
) -> None:
    batch, heads, rows, dim = queries.shape
    kv_batch, kv_heads, capacity, kv_dim = context_keys.shape
    if context_values.shape != context_keys.shape or (kv_batch, kv_dim) != (batch, dim):
        raise ValueError(
            f"Context keys {context_keys.shape} and values {context_values.shape} must both be"
            f" [{batch}, KV heads, capacity, {dim}] for queries {queries.shape}."
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly.")
    if (block_keys is None) != (block_values is None):
        raise ValueError("Give both block_keys and block_values, or neither.")
    end = length
    if block_keys is None or block_values is None:
        end += rows
    elif not block_keys.shape == block_values.shape == (batch, kv_heads, rows, dim):
        raise ValueError(
            f"Block keys {block_keys.shape} and values {block_values.shape} must both be"
            f" {(batch, kv_heads, rows, dim)}."
        )
    if not 0 <= length <= end <= capacity:
        raise ValueError(f"The cache buffer has {capacity} rows; {end} were asked for.")
    if isinstance(visible, str):
        if visible != "causal":
            raise ValueError(f"visible is {visible!r}; a word for it can only be 'causal'.")
    elif visible is not None and (visible.shape != (rows, rows) or visible.dtype != mx.bool_):
        raise ValueError(
            f"visible is {visible.shape} {visible.dtype}; a block of {rows} needs a boolean"
            f" mask {(rows, rows)}."
        )
