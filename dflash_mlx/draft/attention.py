"""A draft layer's attention: the block's queries over context and block."""

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.config import DraftConfig
from dflash_mlx.draft.context import LayerGroup
from dflash_mlx.metal import block_attention


@lru_cache
def causal_rows(L: int) -> mx.array:
    """Which rows of a causal block see which: [L, L] lower triangle."""
    rows = mx.tril(mx.ones((L, L), mx.bool_))
    mx.eval(rows)  # kept over streams and threads
    return rows


class Attention(nn.Module):
    """Queries, keys and values from the block; more keys and values from the context."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__()
        kind, layer = config.attention, config.layers[index]
        dim, bias = config.hidden_size, kind.bias
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5 if kind.scale is None else kind.scale
        self.window, self.anchored, self.causal = layer.window, layer.anchored, layer.causal
        self.value_norm, self.gating = kind.value_norm, kind.gating
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if kind.fused:
            self.qkv_proj = nn.Linear(dim, queries + 2 * keys, bias=bias)
        else:
            self.q_proj = nn.Linear(dim, queries, bias=bias)
            self.k_proj = nn.Linear(dim, keys, bias=bias)
            if not kind.values_from_keys:
                self.v_proj = nn.Linear(dim, keys, bias=bias)
        self.o_proj = nn.Linear(queries, dim, bias=bias and not kind.fused)
        if kind.gating is not None:
            gates = self.heads if kind.gating == "per-head" else queries
            self.g_proj = nn.Linear(dim, gates, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if layer.sinks:
            self.attention_sink_bias = mx.zeros((self.heads,))

    def block_qkv(
        self, x: mx.array, rope: nn.Module, offset: int
    ) -> tuple[mx.array, mx.array, mx.array]:
        """[B, L, H] at positions offset … -> queries [B, Hq, L, D], keys, values [B, Hkv, L, D]."""
        B, L, _ = x.shape
        if "qkv_proj" in self:
            edges = [self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim]
            q, k, v = mx.split(self.qkv_proj(x), edges, axis=-1)
        else:
            q, k = self.q_proj(x), self.k_proj(x)
            v = self.v_proj(x) if "v_proj" in self else k
        queries = self.q_norm(q.reshape(B, L, self.heads, -1)).swapaxes(1, 2)
        keys = self.k_norm(k.reshape(B, L, self.kv_heads, -1)).swapaxes(1, 2)
        values = self.normed_values(v.reshape(B, L, self.kv_heads, -1)).swapaxes(1, 2)
        return rope(queries, offset=offset), rope(keys, offset=offset), values

    def normed_values(self, values: mx.array) -> mx.array:
        """Values [..., D] as they are attended to."""
        return mx.fast.rms_norm(values, None, self.k_norm.eps) if self.value_norm else values

    def __call__(
        self, x: mx.array, group: LayerGroup, index: int, rope: nn.Module, offset: int
    ) -> mx.array:
        """One block [1, L, H] at positions offset …, over layer `index` of `group`'s context."""
        queries, keys, values = self.block_qkv(x, rope, offset)
        L, first, window = x.shape[1], 0, self.window
        if self.anchored and window is not None:
            first, window = max(group.length - window, 0), None
        out = block_attention(
            queries,
            group.keys[index : index + 1],
            group.values[index : index + 1],
            keys,
            values,
            context_length=group.length,
            context_start=first,
            window=window,
            visible=causal_rows(L) if self.causal else None,
            scale=self.scale,
            sinks=self.get("attention_sink_bias"),
        )
        out = out.swapaxes(1, 2)
        if self.gating is not None:
            gates = nn.softplus(self.g_proj(x).astype(mx.float32)).astype(out.dtype)
            out = out * gates.reshape(1, L, self.heads, -1)
        return self.o_proj(out.reshape(1, L, -1))
