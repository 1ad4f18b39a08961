"""Fused Metal kernels and the plain MLX that stands in for them; knows only MLX."""

from .attention import block_attention
from .attention_plain import plain_block_attention

__all__ = ["block_attention", "plain_block_attention"]
