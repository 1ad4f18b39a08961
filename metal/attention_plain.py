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
    visible: mx.array | None = None,
    scale: float,
) -> mx.array:
    """What `block_attention` computes, for any length and head size; see there."""
    length = queries.shape[2]
    first = first_visible(context_length, context_start, window)
    mask = _mask(length, context_length, first, window, visible)

    if block_keys is None or block_values is None:
        end = context_length + length
        keys, values = context_keys[:, :, first:end], context_values[:, :, first:end]
    elif first == context_length:
        keys, values = block_keys, block_values
    else:
        keys = context_keys[:, :, first:context_length]
        values = context_values[:, :, first:context_length]
        if context_length - first >= APART_FROM:
            return _apart(queries, keys, values, block_keys, block_values, mask, scale)
        keys = mx.concatenate([keys, block_keys], axis=2)
        values = mx.concatenate([values, block_values], axis=2)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _apart(queries, context_keys, context_values, block_keys, block_values, mask, scale):
    """Attention to context and block, merged in the softmax instead of in memory.

    The small scores are joined, never the keys and values. The query heads that share a KV
    head are rows of one product.
    """
    batch, heads, length, dim = queries.shape
    kv_heads, seen = context_keys.shape[1], context_keys.shape[2]
    rows = (queries * scale).reshape(batch, kv_heads, -1, dim)
    scores = mx.concatenate(
        [rows @ context_keys.swapaxes(-1, -2), rows @ block_keys.swapaxes(-1, -2)], axis=-1
    )
    if mask is not None:
        by_head = scores.reshape(batch, heads, length, -1)
        by_head = mx.where(mask, by_head, mx.finfo(scores.dtype).min)
        scores = by_head.reshape(scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = weights[..., :seen] @ context_values + weights[..., seen:] @ block_values
    return out.reshape(queries.shape)


def _mask(length, context_length, first, window, visible):
    """Which of the rows first ... context_length and of the block's each row sees, or None."""
    seen = context_length - first
    window_cuts = window is not None and length - 1 + seen >= window
    if visible is None and not window_cuts:
        return None
    if visible is None:
        visible = mx.array(np.ones((length, length), dtype=bool))
    if seen == 0:
        return visible
    context = _context_mask(length, seen, window if window_cuts else None)
    return mx.concatenate([context, visible], axis=1)


@lru_cache(maxsize=8)
def _context_mask(length: int, seen: int, window: int | None) -> mx.array:
    # From NumPy: an array that is data may be kept across traced calls, a lazy one may not.
    distance = seen + np.arange(length)[:, None] - np.arange(seen)[None, :]
    return mx.array(np.ones_like(distance, dtype=bool) if window is None else distance < window)
