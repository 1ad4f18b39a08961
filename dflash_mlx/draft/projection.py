"""Context features to keys and values: one product for all layers of a kind."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.attention import Attention
from dflash_mlx.draft.context import LayerGroup


def signature(linear: nn.Module) -> tuple:
    """What must be equal for two linear layers to be applied as one."""
    quantized = (linear.group_size, linear.bits, linear.mode) if "scales" in linear else None
    return quantized, linear.weight.dtype, linear.weight.shape[1], "bias" in linear


class FusedLinear:
    """Several linear layers of one input, applied as one.

    The layers' own parameters become views of the joined arrays, so that nothing is held twice.
    """

    def __init__(self, linears: Sequence[nn.Module]):
        first = linears[0]
        self.quantized = "scales" in first
        self.settings = (
            {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}
            if self.quantized
            else {}
        )
        self.arrays: dict[str, mx.array] = {}
        for name in ("weight", "scales", "biases", "bias"):
            if first.get(name) is None:
                continue
            joined = mx.concatenate([linear[name] for linear in linears])
            mx.eval(joined)
            start = 0
            for linear in linears:
                rows = linear[name].shape[0]
                linear[name] = joined[start : start + rows]
                start += rows
            mx.eval([linear[name] for linear in linears])
            self.arrays[name] = joined

    def __call__(self, x: mx.array) -> mx.array:
        a = self.arrays
        if self.quantized:
            out = mx.quantized_matmul(
                x, a["weight"], a["scales"], a.get("biases"), transpose=True, **self.settings
            )
        else:
            out = x @ a["weight"].T
        return out + a["bias"] if "bias" in a else out


class ContextProjection:
    """Keys and values of context features for the layers of one LayerGroup."""

    def __init__(self, layers: Sequence[Attention]):
        self.layers = list(layers)
        first = layers[0]
        self.window = first.window
        self.kv_heads, self.head_dim = first.kv_heads, first.head_dim
        keys, values = [a.k_proj for a in layers], [a.v_proj for a in layers]
        # k_proj and v_proj differ in quantization only where --keep or the checkpoint says so.
        same = signature(keys[0]) == signature(values[0])
        self.linears = (
            [FusedLinear(keys + values)] if same else [FusedLinear(keys), FusedLinear(values)]
        )
        self.norm_weight = mx.stack([a.k_norm.weight for a in layers])[:, None, None, :]
        self.eps = first.k_norm.eps
        self._sources = self._source_arrays()

    def _source_arrays(self) -> list[mx.array]:
        return [
            array
            for a in self.layers
            for array in (a.k_proj.weight, a.v_proj.weight, a.k_norm.weight)
        ]

    @property
    def stale(self) -> bool:
        """Whether a layer's parameters were replaced since this was built."""
        now = self._source_arrays()
        return any(a is not b for a, b in zip(now, self._sources, strict=True))

    def make_group(self, dtype: mx.Dtype, full_limit: int | None, sinks: int) -> LayerGroup:
        """Empty buffers for these layers; layers that see everything get the limit, if any."""
        shape = len(self.layers), self.kv_heads, self.head_dim
        if self.window is not None:
            return LayerGroup(*shape, dtype, self.window - 1)
        return LayerGroup(*shape, dtype, full_limit, 0 if full_limit is None else sinks)

    def __call__(self, c: mx.array, rope: nn.Module, offset: int) -> tuple[mx.array, mx.array]:
        """Context features [n, H] at positions offset … -> keys, values [layers, Hkv, n, D]."""
        out = [linear(c) for linear in self.linears]
        joined = out[0] if len(out) == 1 else mx.concatenate(out, axis=-1)
        shape = (c.shape[0], 2, len(self.layers), self.kv_heads, self.head_dim)
        keys, values = joined.reshape(shape).transpose(1, 2, 3, 0, 4)
        keys = mx.fast.rms_norm(keys, None, self.eps) * self.norm_weight
        return rope(keys, offset=offset), values
