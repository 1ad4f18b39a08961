"""Masked-block attention in plain MLX: runs on any device and inside a gradient."""

from functools import lru_cache

import mlx.core as mx
import numpy as np

# From this many context rows on, attending to context and block apart is cheaper than writing
# both into new arrays. On MLX's CPU backend (float32, one core) the two ways cross between 256
# and 1024 rows; at 4096 rows, 32/8 heads of 128 and a block of 8, joining takes 111 ms, apart 92.
APART_FROM = 512


def first_visible(context_length: int, context_start: int, window: int | None) -> int:
    """The first context row that any row of the block sees; context_length if none does."""
    first = context_start
    if window is not None:
        first = max(first, context_length - window + 1)
    return max(0, min(first, context_length))


def plain_block_attention(
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
    """What `block_attention` computes, for any length and head size; see there."""
    length = queries.shape[2]
    if isinstance(visible, str):
        visible = _causal_mask(length)
    first = first_visible(context_length, context_start, window)
    seen = context_length - first
    context_mask = _context_mask(length, seen, window)

    if block_keys is None or block_values is None:
        end = context_length + length
        keys, values = context_keys[:, :, first:end], context_values[:, :, first:end]
    elif first == context_length:
        keys, values = block_keys, block_values
    else:
        keys = context_keys[:, :, first:context_length]
        values = context_values[:, :, first:context_length]
        if seen >= APART_FROM:
            masks = context_mask, visible
            return _apart(queries, keys, values, block_keys, block_values, masks, scale, sinks)
        keys = mx.concatenate([keys, block_keys], axis=2)
        values = mx.concatenate([values, block_values], axis=2)
    mask = _joined_mask(context_mask, visible, length, seen)
    return mx.fast.scaled_dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        mask=mask,
        sinks=None if sinks is None else sinks.astype(queries.dtype),
    )


def _apart(
    queries: mx.array,
    context_keys: mx.array,
    context_values: mx.array,
    block_keys: mx.array,
    block_values: mx.array,
    masks: tuple[mx.array | None, mx.array | None],
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention to context and block, merged in the softmax instead of in memory.

    The small scores are joined, never the keys and values. The query heads that share a KV
    head are rows of one product.
    """
    batch, heads, length, dim = queries.shape
    kv_heads, seen = context_keys.shape[1], context_keys.shape[2]
    rows = (queries * scale).reshape(batch, kv_heads, -1, dim)
    scores = []
    for keys, mask in zip((context_keys, block_keys), masks, strict=True):
        part = rows @ keys.swapaxes(-1, -2)
        if mask is not None:
            by_head = part.reshape(batch, heads, length, -1)
            part = mx.where(mask, by_head, mx.finfo(part.dtype).min).reshape(part.shape)
        scores.append(part)
    if sinks is not None:
        sink = sinks.astype(queries.dtype).reshape(1, kv_heads, -1, 1, 1)
        sink = mx.broadcast_to(sink, (batch, *sink.shape[1:3], length, 1))
        scores.append(sink.reshape(batch, kv_heads, -1, 1))
    weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1, precise=True)
    end = seen + length
    out = weights[..., :seen] @ context_values + weights[..., seen:end] @ block_values
    return out.reshape(queries.shape)


def _context_mask(length: int, seen: int, window: int | None) -> mx.array | None:
    """Which of the last `seen` context rows each row of the block sees; None if all."""
    if window is None or length - 1 + seen < window:
        return None
    return _window_mask(length, seen, window)


@lru_cache(maxsize=8)
def _window_mask(length: int, seen: int, window: int) -> mx.array:
    # From NumPy: an array that is data may be kept across traced calls, a lazy one may not.
    distance = seen + np.arange(length)[:, None] - np.arange(seen)[None, :]
    return mx.array(distance < window)


@lru_cache
def _causal_mask(length: int) -> mx.array:
    return mx.array(np.tril(np.ones((length, length), dtype=bool)))


def _joined_mask(
    context: mx.array | None, visible: mx.array | None, length: int, seen: int
) -> mx.array | None:
    """One mask [L, seen + L] of context and block, or None where nothing is hidden."""
    if context is None and visible is None:
        return None
    if context is None:
        context = mx.ones((length, seen), dtype=mx.bool_)
    if visible is None:
        visible = mx.ones((length, length), dtype=mx.bool_)
    return mx.concatenate([context, visible], axis=1)
