"""The forward of an mlx-lm Qwen3 model for training on a CPU: the same sums, cheaper operations."""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models import qwen3

from dflash_mlx.training import fast_math


def hidden_states(
    model: qwen3.Model, tokens: mx.array, taps: Sequence[int] = ()
) -> tuple[mx.array, list[mx.array]]:
    """Causal forward without a cache.

    tokens: [B, T]. Returns the normed last states [B, T, H] and the outputs [B, T, H] of the
    layers named in `taps`, in that order.
    """
    inner = model.model
    h = inner.embed_tokens(tokens)
    length = tokens.shape[1]
    positions = mx.arange(length)
    mask = mx.where(positions[:, None] >= positions[None, :], 0.0, -1e9)
    recorded = {}
    for index, layer in enumerate(inner.layers):
        h = h + _attention(layer.self_attn, layer.input_layernorm(h), mask)
        u = layer.post_attention_layernorm(h)
        mlp = layer.mlp
        h = h + mlp.down_proj(fast_math.silu(mlp.gate_proj(u)) * mlp.up_proj(u))
        if index in taps:
            recorded[index] = h
    return inner.norm(h), [recorded[tap] for tap in taps]


def tapped_outputs(model: qwen3.Model, tokens: mx.array, taps: Sequence[int]) -> mx.array:
    """Context features [B, T, taps * H] of tokens [B, T]."""
    return mx.concatenate(hidden_states(model, tokens, taps)[1], axis=-1)


def _attention(layer: qwen3.Attention, u: mx.array, mask: mx.array) -> mx.array:
    batch, length, _ = u.shape

    def heads(x: mx.array, count: int) -> mx.array:
        return x.reshape(batch, length, count, -1)

    q = layer.q_norm(heads(layer.q_proj(u), layer.n_heads)).transpose(0, 2, 1, 3)
    k = layer.k_norm(heads(layer.k_proj(u), layer.n_kv_heads)).transpose(0, 2, 1, 3)
    v = heads(layer.v_proj(u), layer.n_kv_heads).transpose(0, 2, 1, 3)
    out = fast_math.attention(layer.rope(q), layer.rope(k), v, mask)
    return layer.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
