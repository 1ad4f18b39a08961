"""A draft layer in its three shapes: as in Qwen3, between convolutions, or between norms."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.attention import Attention
from dflash_mlx.draft.config import ConvolutionConfig, DraftConfig
from dflash_mlx.draft.context import LayerGroup
from dflash_mlx.draft.convolution import BlockConvolution


class MLP(nn.Module):
    """The gated feed-forward."""

    def __init__(self, dim: int, hidden: int, activation: str = "silu"):
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)
        gate = nn.silu(gate) if self.activation == "silu" else nn.gelu_approx(gate)
        return self.down_proj(gate * self.up_proj(x))


class Layer(nn.Module):
    """Attention over context and block, then the MLP."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index)
        self.mlp = MLP(dim, config.intermediate_size, config.activation)
        self.input_layernorm = nn.RMSNorm(dim, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=eps)

    def __call__(
        self, x: mx.array, group: LayerGroup, index: int, rope: nn.Module, offset: int
    ) -> mx.array:
        """The block [1, L, H] at positions offset …, over layer `index` of `group`'s context."""
        x = x + self.self_attn(self.input_layernorm(x), group, index, rope, offset)
        return x + self.mlp(self.post_attention_layernorm(x))


class ConvolvedLayer(Layer):
    """DFlash 2's: sublayers stand between convolutions driven by their normed input."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__(config, index)
        convolution = cast(ConvolutionConfig, config.convolution)
        sizes = (config.hidden_size, convolution.kernel_size, convolution.group_size)
        self.attention_conv = BlockConvolution(*sizes)
        self.mlp_conv = BlockConvolution(*sizes)

    def __call__(
        self, x: mx.array, group: LayerGroup, index: int, rope: nn.Module, offset: int
    ) -> mx.array:
        u = self.input_layernorm(x)
        kernels, convolve = self.attention_conv.kernels(u), BlockConvolution.convolve
        out = self.self_attn(convolve(kernels[:, :, 0], u), group, index, rope, offset)
        x = x + convolve(kernels[:, :, 1], out)
        u = self.post_attention_layernorm(x)
        kernels = self.mlp_conv.kernels(u)
        return x + convolve(kernels[:, :, 1], self.mlp(convolve(kernels[:, :, 0], u)))


class SandwichLayer(Layer):
    """Gemma 4's: norms before and behind each sublayer, and a factor for the whole layer."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__(config, index)
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.pre_feedforward_layernorm = nn.RMSNorm(dim, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(dim, eps=eps)
        self.layer_scalar = mx.ones((1,))

    def __call__(
        self, x: mx.array, group: LayerGroup, index: int, rope: nn.Module, offset: int
    ) -> mx.array:
        out = self.self_attn(self.input_layernorm(x), group, index, rope, offset)
        x = x + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(x))
        return (x + self.post_feedforward_layernorm(out)) * self.layer_scalar


def make_layer(config: DraftConfig, index: int) -> Layer:
    """Layer `index` of a draft."""
    if config.convolution is not None:
        return ConvolvedLayer(config, index)
    return SandwichLayer(config, index) if config.sandwich else Layer(config, index)
