"""Context features to keys and values: one product for all layers of a kind."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.attention import Attention
from dflash_mlx.draft.context import LayerGroup

_ARRAYS = ("weight", "scales", "biases", "bias")


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
        for name in _ARRAYS:
            if first.get(name) is None:
                continue
            if len(linears) == 1:
                self.arrays[name] = first[name]
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

    @classmethod
    def rows(cls, linear: nn.Module, start: int) -> "FusedLinear":
        """A linear layer without its first outputs."""
        part = cls([linear])
        part.arrays = {name: array[start:] for name, array in part.arrays.items()}
        return part

    def __call__(self, x: mx.array) -> mx.array:
        a = self.arrays
        if self.quantized:
            out = mx.quantized_matmul(
                x, a["weight"], a["scales"], a.get("biases"), transpose=True, **self.settings
            )
        else:
            out = x @ a["weight"].T
        return out + a["bias"] if "bias" in a else out


def kind_of(attention: Attention) -> tuple:
    """What must be equal for two layers to share a projection and a buffer, but for the rope."""
    return attention.window, *(signature(linear) for linear in _sources(attention))


def _sources(attention: Attention) -> Sequence[nn.Module]:
    """The linear layers that keys and values come from."""
    if "qkv_proj" in attention:
        return [attention.qkv_proj]
    return [attention.k_proj] + ([attention.v_proj] if "v_proj" in attention else [])


class ContextProjection:
    """Keys and values of context features for the layers of one LayerGroup."""

    def __init__(self, layers: Sequence[Attention], apart: bool = False):
        """`apart` where each layer gets features of its own."""
        self.layers = list(layers)
        first = layers[0]
        self.window, self.anchored = first.window, first.anchored
        self.kv_heads, self.head_dim = first.kv_heads, first.head_dim
        # A list of products for each input; their results side by side are [keys …, values …].
        self.products = (
            [self._products([layer]) for layer in layers] if apart else [self._products(layers)]
        )
        self.norm_weight = mx.stack([a.k_norm.weight for a in layers])[:, None, None, :]
        self.eps = first.k_norm.eps
        self._sources = self._source_arrays()
        # Whoever runs the draft first may be another thread, which cannot reach this one's stream.
        mx.eval(self.norm_weight, [p.arrays for products in self.products for p in products])

    @staticmethod
    def _products(layers: Sequence[Attention]) -> list[FusedLinear]:
        first = layers[0]
        if "qkv_proj" in first:
            start = first.heads * first.head_dim
            return [FusedLinear.rows(a.qkv_proj, start) for a in layers]
        keys = [a.k_proj for a in layers]
        if "v_proj" not in first:
            return [FusedLinear(keys)]
        values = [a.v_proj for a in layers]
        # k_proj and v_proj differ in quantization only where --keep or the checkpoint says so.
        same = signature(keys[0]) == signature(values[0])
        return [FusedLinear(keys + values)] if same else [FusedLinear(keys), FusedLinear(values)]

    def _source_arrays(self) -> list[mx.array]:
        return [
            array
            for a in self.layers
            for array in (*(linear.weight for linear in _sources(a)), a.k_norm.weight)
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
            return LayerGroup(*shape, dtype, self.window if self.anchored else self.window - 1)
        return LayerGroup(*shape, dtype, full_limit, 0 if full_limit is None else sinks)

    def __call__(
        self, features: Sequence[mx.array], rope: nn.Module, offset: int
    ) -> tuple[mx.array, mx.array]:
        """Context features at positions offset … -> keys and values, both [layers, Hkv, n, D].

        Args:
            features: [n, H] for all layers, or one for each where they were said to be apart.
        """
        parts = [
            self._split(products, c, len(self.layers) // len(self.products))
            for products, c in zip(self.products, features, strict=True)
        ]
        keys, values = parts[0]
        if len(parts) > 1:
            keys = mx.concatenate([part[0] for part in parts])
            values = mx.concatenate([part[1] for part in parts])
        keys = mx.fast.rms_norm(keys, None, self.eps) * self.norm_weight
        return rope(keys, offset=offset), self.layers[0].normed_values(values)

    def _split(
        self, products: Sequence[FusedLinear], c: mx.array, layers: int
    ) -> tuple[mx.array, mx.array]:
        """Products of c [n, H] -> keys and values of so many layers, [layers, Hkv, n, D]."""
        out = [linear(c) for linear in products]
        joined = out[0] if len(out) == 1 else mx.concatenate(out, axis=-1)
        shape = (c.shape[0], -1, layers, self.kv_heads, self.head_dim)
        both = joined.reshape(shape).transpose(1, 2, 3, 0, 4)
        return both[0], both[-1]
