"""Many DFlash blocks of each sequence in one forward, and their loss (arXiv:2602.06036).

A block starts at an anchor position p: the real token there, then masks. It sees the context
features of positions before p and its own rows, and nothing of any other block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from dflash_mlx.draft.attention import Attention
from dflash_mlx.draft.model import DFlashDraft
from dflash_mlx.training import fast_math
from dflash_mlx.training.batches import Batch

HIDDEN = -1e9  # what a score gets that must not be seen
MOST_LOGITS = 1 << 26  # of one part of the loss: 256 MB in float32
SMOOTHING = 0.5  # D-PACE's alpha: the least chance that a row's proposal is taken to have

Head = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch: A anchors in each of B sequences, block_size n.

    Attributes:
        anchors: int32 [B, A], positions from 1.
        first: int32 [B, A], the tokens there.
        targets: int32 [B, A, n - 1], the true continuations.
        weights: float32 [B, A, n - 1], zero for rows that have nothing to learn (padding, other
            people's tokens, spare anchors).
    """

    anchors: np.ndarray
    first: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def choose_blocks(
    batch: Batch, anchors: int, block_size: int, gamma: float, rng: np.random.Generator
) -> Blocks:
    """Draw up to `anchors` positions of each row, each a learnt token with a learnt one after it.

    Row k of a block weighs exp(-(k - 1) / gamma), up to the first token that is not to be learnt;
    with gamma infinite, one.
    """
    rows, _ = batch.tokens.shape
    padding = np.zeros((rows, block_size), dtype=np.int32)
    tokens = np.concatenate([batch.tokens, padding], axis=1)
    learn = np.concatenate([batch.learn, padding.astype(bool)], axis=1)
    positions = np.ones((rows, anchors), dtype=np.int32)
    used = np.zeros((rows, anchors), dtype=bool)
    for row in range(rows):
        able = np.flatnonzero(learn[row, 1:-1] & learn[row, 2:]) + 1
        chosen = rng.permutation(able)[:anchors]
        positions[row, : len(chosen)] = chosen
        used[row, : len(chosen)] = True
    following = positions[:, :, None] + np.arange(1, block_size)
    flat = following.reshape(rows, -1)
    targets = np.take_along_axis(tokens, flat, axis=1).reshape(following.shape)
    wanted = np.take_along_axis(learn, flat, axis=1).reshape(following.shape) & used[:, :, None]
    weights = np.exp(-np.arange(block_size - 1) / gamma) * np.logical_and.accumulate(wanted, axis=2)
    first = np.take_along_axis(tokens, positions, axis=1)
    return Blocks(positions, first, targets, weights.astype(np.float32))


def block_states(
    draft: DFlashDraft, features: mx.array, embeddings: mx.array, anchors: mx.array
) -> mx.array:
    """The final states of all blocks.

    Args:
        features: [B, T, taps * H], the target's outputs at every position.
        embeddings: [B, A, n, H] of the blocks' tokens.
        anchors: int [B, A].

    Returns:
        [B, A, n, H], after the final norm.
    """
    batch, count, rows, _ = embeddings.shape
    context = draft.hidden_norm(draft.fc(features.astype(draft.dtype)))
    x = embeddings.astype(draft.dtype).reshape(batch * count, rows, -1)
    positions = anchors[:, :, None] + mx.arange(rows)
    for i, layer in enumerate(draft.layers):
        attention = layer.self_attn
        u = layer.input_layernorm(x)
        x = x + _attend(attention, u, context, positions, anchors, draft.rope(i))
        u = layer.post_attention_layernorm(x)
        mlp = layer.mlp
        x = x + mlp.down_proj(fast_math.silu(mlp.gate_proj(u)) * mlp.up_proj(u))
    return draft.norm(x).reshape(embeddings.shape)


def _attend(
    attention: Attention,
    u: mx.array,
    context: mx.array,
    positions: mx.array,
    anchors: mx.array,
    rope: Any,
) -> mx.array:
    """Attention of blocks u [B * A, n, H] over context [B, T, H] and, each, over itself."""
    batch, count, rows = positions.shape
    length = context.shape[1]
    heads, kv_heads = attention.heads, attention.kv_heads
    group, width = heads // kv_heads, attention.head_dim

    offsets: Any = anchors.reshape(-1)
    q, own_k, own_v = attention.block_qkv(u, rope, offsets)
    k = attention.k_norm(attention.k_proj(context).reshape(batch, length, kv_heads, width))
    k = rope(k.swapaxes(1, 2))
    v = attention.v_proj(context).reshape(batch, length, kv_heads, width).swapaxes(1, 2)

    # Over the context: the blocks of a sequence share its keys, so their rows stand together.
    q = (q * attention.scale).reshape(batch, count, kv_heads, group, rows, width)
    together = q.transpose(0, 2, 3, 1, 4, 5).reshape(batch, kv_heads, group, count * rows, width)
    scores = together @ k[:, :, None].swapaxes(-1, -2)
    scores = scores + _context_mask(positions, anchors, length, attention.window)[:, None, None]

    # Over the block itself.
    own_k = own_k.reshape(batch, count, kv_heads, 1, rows, width)
    own_v = own_v.reshape(batch, count, kv_heads, 1, rows, width)
    own = q @ own_k.swapaxes(-1, -2) + _own_mask(rows, attention.causal)
    own = own.transpose(0, 2, 3, 1, 4, 5)  # [B, K, G, A, n, n]

    by_block = (batch, kv_heads, group, count, rows, -1)
    peak = mx.maximum(
        scores.max(axis=-1, keepdims=True).reshape(*by_block), own.max(axis=-1, keepdims=True)
    )
    peak = mx.stop_gradient(peak)
    seen = fast_math.exp(scores - peak.reshape(batch, kv_heads, group, count * rows, 1))
    own = fast_math.exp(own - peak)
    total = seen.sum(axis=-1).reshape(by_block[:-1]) + own.sum(axis=-1)
    out = (seen @ v[:, :, None]).reshape(*by_block)
    out = out + own @ own_v.transpose(0, 2, 3, 1, 4, 5)
    out = (out / total[..., None]).transpose(0, 3, 4, 1, 2, 5)
    return attention.o_proj(out.reshape(batch * count, rows, heads * width))


def _context_mask(
    positions: mx.array, anchors: mx.array, length: int, window: int | None
) -> mx.array:
    """Additive [B, A * n, T]: what a block's rows see of the context."""
    keys = mx.arange(length)
    visible = keys < anchors[:, :, None, None]
    if window is not None:
        visible = visible & (positions[..., None] - keys < window)
    visible = mx.broadcast_to(visible, (*positions.shape, length))
    return mx.where(visible, 0.0, HIDDEN).reshape(positions.shape[0], -1, length)


def _own_mask(rows: int, causal: bool) -> mx.array:
    """Additive [n, n]: what a block's rows see of the block; a window does not apply here."""
    if not causal:
        return mx.zeros((rows, rows))
    return mx.where(mx.tril(mx.ones((rows, rows), dtype=mx.bool_)), 0.0, HIDDEN)


def proposal_states(
    draft: DFlashDraft,
    features: mx.array,
    first: mx.array,
    anchors: mx.array,
    embed: Callable[[mx.array], mx.array],
) -> mx.array:
    """The final states of the blocks' proposal rows, [B, A, n - 1, H].

    Args:
        features: [B, T, taps * H].
        first, anchors: int [B, A].
        embed: the target's.
    """
    masks = mx.full((*first.shape, draft.block_size - 1), draft.config.mask_token_id, first.dtype)
    tokens = mx.concatenate([first[..., None], masks], axis=-1)
    embeddings = embed(tokens.reshape(first.shape[0], -1)).reshape(*tokens.shape, -1)
    hidden = block_states(draft, features, embeddings, anchors)[:, :, 1:]
    return hidden.astype(embeddings.dtype)


def state_logits(draft: DFlashDraft, states: mx.array, head: Head) -> mx.array:
    """Logits [N, V] of final states [N, H].

    Args:
        head: the target's, on [1, N, H].
    """
    logits = head(states[None])[0]
    cap = draft.config.final_logit_softcapping
    return logits if cap is None else mx.tanh(logits / cap) * cap


def block_loss(
    draft: DFlashDraft,
    states: mx.array,
    targets: mx.array,
    weights: mx.array,
    head: Head,
    raised: mx.array | None = None,
    most_logits: int = MOST_LOGITS,
    adaptive: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Weighted mean cross-entropy, which rows' most likely token was right, and what they weigh.

    With a large vocabulary the logits of all rows would fill the memory several times over. Rows
    are then taken in parts whose logits are computed once more for the gradient.

    Args:
        draft: has the cap on the logits.
        states: of the proposal rows, [..., H].
        targets, weights: [...]; returns the loss, a scalar, bool [...], and the sum of the
            weights, a scalar.
        head: the target's, [1, N, H] -> [1, N, V], or a part of it that `targets` point into.
        raised: [V], added to the logits in the loss; whether a row was right leaves it out.
        most_logits: the most logits of a part.
        adaptive: multiply the weights by those of `adaptive_weights`.
    """
    vocabulary = draft.config.vocab_size if raised is None else raised.size
    shape, rows = targets.shape, max(1, most_logits // vocabulary)
    states, targets = states.reshape(-1, states.shape[-1]), targets.flatten()
    losses: list[mx.array] = []
    hits: list[mx.array] = []
    for start in range(0, targets.size, rows):
        end = start + rows
        part = partial(_part_loss, draft, head, raised, targets[start:end])
        loss, right = (mx.checkpoint(part) if rows < targets.size else part)(states[start:end])
        losses.append(loss)
        hits.append(right)
    each = mx.concatenate(losses).reshape(shape)
    if adaptive:
        weights = weights * adaptive_weights(each, weights > 0)
    weight = weights.sum()
    total = (each * weights).sum() / mx.maximum(weight, 1e-6)
    return total, mx.concatenate(hits).reshape(shape), weight


def adaptive_weights(losses: mx.array, used: mx.array) -> mx.array:
    """What each row adds to the expected number of accepted proposals (D-PACE, arXiv:2605.18810).

    A proposal's chance is the draft's likelihood of the true token, smoothed; a block's proposals
    are accepted up to m with the product of the first m chances. Row j weighs the sum of these
    products from m = j on: early rows at first, and later ones once the early ones are learnt.

    Args:
        losses: cross-entropy [..., n - 1].
        used: bool [..., n - 1], which rows have something to learn.

    Returns:
        [..., n - 1], without a gradient.
    """
    chances = (SMOOTHING + (1 - SMOOTHING) * mx.exp(-losses)) * used
    return mx.stop_gradient(mx.cumsum(mx.cumprod(chances, axis=-1), axis=-1, reverse=True))


def _part_loss(
    draft: DFlashDraft,
    head: Head,
    raised: mx.array | None,
    targets: mx.array,
    states: mx.array,
) -> tuple[mx.array, mx.array]:
    logits = state_logits(draft, states, head)
    right = mx.argmax(logits, axis=-1) == targets
    if raised is not None:
        logits = logits + raised
    return fast_math.cross_entropy(logits, targets), right
