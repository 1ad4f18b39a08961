"""The forward of an mlx-lm Qwen3 model for training on a CPU: the same sums, cheaper operations."""

import mlx.core as mx
from mlx_lm.models import qwen3

from dflash_mlx.training import fast_math


def hidden_states(model: qwen3.Model, tokens: mx.array) -> mx.array:
    """Causal forward without a cache: tokens [B, T] -> normed last states [B, T, H]."""
    inner = model.model
    h = inner.embed_tokens(tokens)
    positions = mx.arange(tokens.shape[1])
    mask = mx.where(positions[:, None] >= positions[None, :], 0.0, -1e9)
    for layer in inner.layers:
        h = h + _attention(layer.self_attn, layer.input_layernorm(h), mask)
        u = layer.post_attention_layernorm(h)
        mlp = layer.mlp
        h = h + mlp.down_proj(fast_math.silu(mlp.gate_proj(u)) * mlp.up_proj(u))
    return inner.norm(h)


def _attention(layer: qwen3.Attention, u: mx.array, mask: mx.array) -> mx.array:
    batch, length, _ = u.shape

    def heads(x: mx.array, count: int) -> mx.array:
        return x.reshape(batch, length, count, -1)

    q = layer.q_norm(heads(layer.q_proj(u), layer.n_heads)).transpose(0, 2, 1, 3)
    k = layer.k_norm(heads(layer.k_proj(u), layer.n_kv_heads)).transpose(0, 2, 1, 3)
    v = heads(layer.v_proj(u), layer.n_kv_heads).transpose(0, 2, 1, 3)
    out = fast_math.attention(layer.rope(q), layer.rope(k), v, mask)
    return layer.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
