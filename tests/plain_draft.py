"""The forwards of DFlash 1 and 2 in plain NumPy float64, straight from the formulas.

It shares nothing with the library: no cache, no fusing, no windowed buffers. Every call computes
keys and values of the whole context again.
"""

from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x [n, heads, D], rotated in halves."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def context_features(t: Tensors, config: dict[str, Any], features: np.ndarray) -> np.ndarray:
    """Tapped outputs [n, taps * H] -> [n, H]."""
    return rms_norm(features @ t["fc.weight"].T, t["hidden_norm.weight"], config["rms_norm_eps"])


def linear(t: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    out = x @ t[f"{name}.weight"].T
    return out + t[f"{name}.bias"] if f"{name}.bias" in t else out


def attention(
    t: Tensors, config: dict[str, Any], layer: int, x: np.ndarray, c: np.ndarray
) -> np.ndarray:
    """Block rows x [L, H] (normed) over context features c [n, H] and the block itself."""
    name, n, L = f"layers.{layer}.self_attn", len(c), len(x)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, eps, theta = config["head_dim"], config["rms_norm_eps"], config["rope_theta"]
    positions = np.arange(n + L)
    rows = np.concatenate([c, x])
    q = linear(t, f"{name}.q_proj", x).reshape(L, heads, dim)
    k = linear(t, f"{name}.k_proj", rows).reshape(n + L, kv_heads, dim)
    v = linear(t, f"{name}.v_proj", rows).reshape(n + L, kv_heads, dim)
    q = rope(rms_norm(q, t[f"{name}.q_norm.weight"], eps), positions[n:], theta)
    k = rope(rms_norm(k, t[f"{name}.k_norm.weight"], eps), positions, theta)
    k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)

    sliding = config.get("layer_types", ["full_attention"] * 99)[layer] == "sliding_attention"
    causal = config.get("is_causal", sliding)
    visible = np.ones((L, n + L), bool)
    for i in range(L):
        for j in range(n + L):
            if j < n and sliding and (n + i) - j >= config["sliding_window"]:
                visible[i, j] = False
            if j >= n and causal and j - n > i:
                visible[i, j] = False
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, v).reshape(L, heads * dim)
    return linear(t, f"{name}.o_proj", out)


def layer_forward(
    t: Tensors, config: dict[str, Any], layer: int, x: np.ndarray, c: np.ndarray
) -> np.ndarray:
    name, eps = f"layers.{layer}", config["rms_norm_eps"]
    u = rms_norm(x, t[f"{name}.input_layernorm.weight"], eps)
    out = attention(t, config, layer, convolve(t, f"{name}.attention_conv", 0, u, u), c)
    x = x + convolve(t, f"{name}.attention_conv", 1, u, out)
    u = rms_norm(x, t[f"{name}.post_attention_layernorm.weight"], eps)
    out = mlp(t, f"{name}.mlp", convolve(t, f"{name}.mlp_conv", 0, u, u))
    return x + convolve(t, f"{name}.mlp_conv", 1, u, out)


def mlp(t: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    gate, up = linear(t, f"{name}.gate_proj", x), linear(t, f"{name}.up_proj", x)
    return linear(t, f"{name}.down_proj", silu(gate) * up)


def convolve(t: Tensors, name: str, side: int, u: np.ndarray, x: np.ndarray) -> np.ndarray:
    """DFlash 2's convolution of x [L, H] driven by u [L, H]; DFlash 1 has none."""
    if f"{name}.base_kernel" not in t:
        return x
    base = t[f"{name}.base_kernel"]
    _, taps, dim = base.shape
    P = t[f"{name}.kernel_projection.weight"]
    groups = P.shape[0] // (2 * taps)
    y = np.zeros_like(x)
    for row in range(len(x)):
        D = (P @ u[row]).reshape(2, taps, groups)
        for tap in range(min(taps, row + 1)):
            for channel in range(dim):
                weight = base[side, tap, channel] + D[side, tap, channel // (dim // groups)]
                y[row, channel] += weight * x[row - tap, channel]
    return y


def select(
    t: Tensors, anchor: int, hidden: np.ndarray, logits: np.ndarray, top_k: int
) -> tuple[list[int], list[dict[int, float]]]:
    """DFlash 2's chain at temperature 0, and the scores of each position's candidates."""
    A = t["candidate_selector.predecessor_codebook"]
    B = t["candidate_selector.successor_codebook"]
    W = t["candidate_selector.hidden_projection.weight"]
    before, tokens, scores = anchor, [], []
    for h, row in zip(hidden, logits, strict=True):
        candidates = np.argsort(-row)[:top_k]
        scores.append({int(b): row[b] + (A[before] * (W @ h)) @ B[b] for b in candidates})
        before = max(scores[-1], key=lambda b: scores[-1][b])
        tokens.append(before)
    return tokens, scores


def layer_outputs(
    t: Tensors, config: dict[str, Any], embeddings: np.ndarray, features: np.ndarray
) -> list[np.ndarray]:
    """The block's hidden states after each layer and, last, after the final norm: [L, H] each."""
    c = context_features(t, config, features)
    outputs, x = [], embeddings
    for layer in range(config["num_hidden_layers"]):
        x = layer_forward(t, config, layer, x, c)
        outputs.append(x)
    outputs.append(rms_norm(x, t["norm.weight"], config["rms_norm_eps"]))
    return outputs
