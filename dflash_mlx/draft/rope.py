"""Rotary positions of a draft layer."""

import math

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import YarnRoPE, initialize_rope

from dflash_mlx.draft.config import Rope


def make_rope(rope: Rope, head_dim: int) -> nn.Module:
    """mlx_lm's module for it, called on [B, heads, L, head_dim] with an offset."""
    dims = int(head_dim * rope.share) // 2 * 2
    scaling = None if rope.scaling is None else dict(rope.scaling)
    module = initialize_rope(dims, rope.theta, rope.interleaved, scaling, rope.max_positions)
    if isinstance(module, YarnRoPE) and scaling is not None:
        # Two of Transformers' keys that mlx_lm passes over.
        factor = scaling.get("attention_factor")
        if factor is not None:
            module.mscale = float(factor)
        if scaling.get("truncate") is False:
            module._freqs = _untruncated(rope, dims)
    return module


def _untruncated(rope: Rope, dims: int) -> mx.array:
    """YaRN's wavelengths where the ramp between the two kinds begins and ends inside a pair."""
    scaling = rope.scaling or {}

    def pair(rotations: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(pair(scaling.get("beta_fast") or 32), 0)
    high = min(pair(scaling.get("beta_slow") or 1), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
    plain = rope.theta ** (-mx.arange(0, dims, 2) / dims)
    return 1 / (plain * (1 - ramp) + plain / scaling["factor"] * ramp)
