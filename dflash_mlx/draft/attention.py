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

    def __init__(self, config: DraftConfig, layer: int):
        super().__init__()
        dim, bias = config.hidden_size, config.attention_bias
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5
        self.window = config.window(layer)
        self.causal = config.causal_block(layer)
        self.q_proj = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, dim, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def block_qkv(
        self, x: mx.array, rope: nn.Module, offset: int
    ) -> tuple[mx.array, mx.array, mx.array]:
        """[B, L, H] at positions offset … -> queries [B, Hq, L, D], keys, values [B, Hkv, L, D]."""
        B, L, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(B, L, self.heads, -1)).swapaxes(1, 2)
        keys = self.k_norm(self.k_proj(x).reshape(B, L, self.kv_heads, -1)).swapaxes(1, 2)
        values = self.v_proj(x).reshape(B, L, self.kv_heads, -1).swapaxes(1, 2)
        return rope(queries, offset=offset), rope(keys, offset=offset), values

    def __call__(
        self, x: mx.array, group: LayerGroup, index: int, rope: nn.Module, offset: int
    ) -> mx.array:
        """One block [1, L, H] at positions offset …, over layer `index` of `group`'s context."""
        queries, keys, values = self.block_qkv(x, rope, offset)
        L = x.shape[1]
        out = block_attention(
            queries,
            group.keys[index : index + 1],
            group.values[index : index + 1],
            keys,
            values,
            context_length=group.length,
            window=self.window,
            visible=causal_rows(L) if self.causal else None,
            scale=self.scale,
        )
        return self.o_proj(out.swapaxes(1, 2).reshape(1, L, -1))
