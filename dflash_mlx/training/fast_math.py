"""Attention, SiLU and cross-entropy for training on a CPU, on a cheaper exponential.

MLX's CPU backend computes `exp` number by number, and in a narrow model that is most of a training
step. Powers of two by their bits and a polynomial for the rest are several times faster and right
to about 3e-7.
"""

import math
from typing import Any

import mlx.core as mx

_LOG2_E = math.log2(math.e)
_TAYLOR = [math.log(2) ** k / math.factorial(k) for k in range(7)]


@mx.compile
def _exp(x: mx.array) -> mx.array:
    power = mx.clip(x, -87.0, 88.0) * _LOG2_E
    whole = mx.floor(power + 0.5)
    rest = power - whole
    series = mx.array(_TAYLOR[6])
    for coefficient in reversed(_TAYLOR[:6]):
        series = series * rest + coefficient
    exponent_bits = (whole.astype(mx.int32) + 127) << 23
    return series * exponent_bits.view(mx.float32)


_differentiable_exp: Any = mx.custom_function(_exp)


@_differentiable_exp.vjp
def _exp_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def exp(x: mx.array) -> mx.array:
    """e to the power of x, float32; on a CPU x is clipped to [-87, 88]."""
    x = x.astype(mx.float32)
    return _differentiable_exp(x) if mx.default_device().type == mx.cpu else mx.exp(x)


def silu(x: mx.array) -> mx.array:
    """x times its logistic function."""
    return x / (1 + exp(-x))


def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """Softmax attention, scaled by 1 / sqrt(D).

    Args:
        queries: [B, H, L, D].
        keys, values: [B, K, S, D] with K a divisor of H.
        mask: additive, broadcast to [B, 1, L, S].

    Returns:
        [B, H, L, D].
    """
    batch, heads, rows, width = queries.shape
    kv_heads = keys.shape[1]
    queries = (queries * width**-0.5).reshape(batch, kv_heads, heads // kv_heads, rows, width)
    keys, values = keys[:, :, None], values[:, :, None]
    scores = queries @ keys.swapaxes(-1, -2) + mx.expand_dims(mask, -3)
    weights = exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    output = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    return output.reshape(batch, heads, rows, width)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Logits [N, V] and targets [N] -> each target's negative log-likelihood [N]."""
    logits = logits.astype(mx.float32)
    peak = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = exp(logits - peak).sum(axis=-1)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return mx.log(total) + peak[:, 0] - chosen
