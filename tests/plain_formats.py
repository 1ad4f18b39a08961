"""The forward of every format in plain NumPy float64, straight from the formulas.

It shares nothing with the library: no cache, no readers, no renamed tensors; every call computes
keys and values of the whole context again. What a checkpoint means is told by its `Traits`.
"""

from collections.abc import Callable

import numpy as np

from tests.checkpoint_parts import HEADS, Traits

Tensors = dict[str, np.ndarray]


def rms(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class PlainDraft:
    """One checkpoint with its traits; `embed` and `head` are tables [V, H]."""

    def __init__(
        self, t: Tensors, traits: Traits, layers: int, embed: np.ndarray, head: np.ndarray
    ):
        self.t = {name: array.astype(np.float64) for name, array in t.items()}
        self.traits, self.layers = traits, layers
        self.embed = self.t.get("embed_tokens.weight", embed)
        self.scale = traits.embedding_scale if "embed_tokens.weight" in self.t else 1.0
        self.head = self.embed if traits.tied else self.t.get("lm_head.weight", head)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        out = x @ self.t[f"{name}.weight"].T
        return out + self.t[f"{name}.bias"] if f"{name}.bias" in self.t else out

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return rms(x, self.t[f"{name}.weight"], self.traits.eps)

    def rope(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """x [n, heads, D]."""
        traits, half = self.traits, x.shape[-1] // 2
        speeds, factor = traits.theta ** (-np.arange(half) / half), 1.0
        if traits.frequencies:
            speeds, factor = traits.frequencies()
        if traits.rotated is not None:
            speeds = np.where(np.arange(half) < traits.rotated, speeds, 0)
        angles = positions[:, None, None] * speeds
        cos, sin = factor * np.cos(angles), factor * np.sin(angles)
        if traits.pairs:
            a, b = x[..., 0::2], x[..., 1::2]
            return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def context(self, features: np.ndarray) -> list[np.ndarray]:
        """Tapped outputs [n, taps * H] -> what each layer's keys and values are made of."""
        traits, t = self.traits, self.t
        taps = features.reshape(len(features), -1, t[f"{traits.fc}.weight"].shape[0])
        if traits.tap_norms:
            norms = [t[f"aux_hidden_norms.{i}.weight"] for i in range(taps.shape[1])]
            taps = rms(taps, np.stack(norms), traits.eps)
        c = self.linear(traits.fc, taps.reshape(len(features), -1))
        seen = []
        for layer in range(self.layers):
            mixed = c
            if traits.fusion:
                weights = np.exp(t["layer_fusion_weights"][layer])
                mixed = c + np.einsum("t,nth->nh", weights / weights.sum(), taps)
            mixed = self.norm(traits.hidden_norm, mixed)
            if traits.layer_norms:
                mixed = self.norm(f"layers.{layer}.input_layernorm", mixed)
            seen.append(mixed)
        return seen

    def attention(self, layer: int, u: np.ndarray, c: np.ndarray) -> np.ndarray:
        traits, name = self.traits, f"layers.{layer}.self_attn"
        n, rows, dim, kv = len(c), len(u), traits.dim, traits.kv
        both = np.concatenate([c, u])
        if traits.fused:
            q, k, v = np.split(
                self.linear(f"{name}.qkv_proj", both), [HEADS * dim, (HEADS + kv) * dim], axis=-1
            )
        else:
            q, k = self.linear(f"{name}.q_proj", both), self.linear(f"{name}.k_proj", both)
            v = k if traits.values_from_keys else self.linear(f"{name}.v_proj", both)
        positions = np.arange(n + rows)
        q = self.norm(f"{name}.q_norm", q[n:].reshape(rows, HEADS, dim))
        q = self.rope(q, positions[n:])
        v = v.reshape(-1, kv, dim)
        if traits.value_norm:
            v = rms(v, 1.0, traits.eps)
        k = self.rope(self.norm(f"{name}.k_norm", k.reshape(-1, kv, dim)), positions)
        scale = dim**-0.5 if traits.scale is None else traits.scale
        sinks = self.t.get(f"{name}.attention_sink_bias")
        out = np.empty((rows, HEADS, dim))
        for i in range(rows):
            first = traits.sees(n, i, layer)
            last = n + (i + 1 if traits.causal[layer] else rows)
            for h in range(HEADS):
                keys, values = k[first:last, h * kv // HEADS], v[first:last, h * kv // HEADS]
                scores = keys @ q[i, h] * scale
                weights = np.exp(scores)
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[h]))
                out[i, h] = weights @ values / total
        if traits.gating:
            gates = np.log1p(np.exp(self.linear(f"{name}.g_proj", u)))
            out = out * gates.reshape(rows, HEADS, -1)
        return self.linear(f"{name}.o_proj", out.reshape(rows, -1))

    def mlp(self, layer: int, u: np.ndarray) -> np.ndarray:
        name, act = f"layers.{layer}.mlp", gelu if self.traits.gelu else silu
        return self.linear(
            f"{name}.down_proj",
            act(self.linear(f"{name}.gate_proj", u)) * self.linear(f"{name}.up_proj", u),
        )

    def convolved(
        self, name: str, u: np.ndarray, sublayer: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """A sublayer between DFlash 2's convolutions, or alone where there are none."""
        if not self.traits.convolved:
            return sublayer(u)
        kernels = self.linear(f"{name}.kernel_projection", u).reshape(len(u), 2, 2, -1)
        kernels = self.t[f"{name}.base_kernel"] + np.repeat(kernels, 8, axis=-1)

        def side(which: int, x: np.ndarray) -> np.ndarray:
            before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
            return kernels[:, which, 0] * x + kernels[:, which, 1] * before

        return side(1, sublayer(side(0, u)))

    def hidden(self, features: np.ndarray, tokens: list[int], masked: int) -> np.ndarray:
        """[B, H] after the final norm; tokens from `masked` on are masks."""
        x = self.embed[tokens] * self.scale
        if "mask_embedding" in self.t:
            x[masked:] = self.t["mask_embedding"]
        for i, c in enumerate(self.context(features)):
            name, sandwich = f"layers.{i}", self.traits.sandwich
            u = self.norm(f"{name}.input_layernorm", x)
            out = self.convolved(
                f"{name}.attention_conv", u, lambda u, i=i, c=c: self.attention(i, u, c)
            )
            x = x + (self.norm(f"{name}.post_attention_layernorm", out) if sandwich else out)
            before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
            u = self.norm(f"{name}.{before}", x)
            out = self.convolved(f"{name}.mlp_conv", u, lambda u, i=i: self.mlp(i, u))
            x = x + (self.norm(f"{name}.post_feedforward_layernorm", out) if sandwich else out)
            if sandwich:
                x = x * self.t[f"{name}.layer_scalar"]
        return self.norm(self.traits.norm, x)

    def base(self, hidden: np.ndarray) -> np.ndarray:
        logits, cap = hidden @ self.head.T, self.traits.cap
        return logits if cap is None else cap * np.tanh(logits / cap)

    def ids(self) -> np.ndarray:
        """The target's id of each row of the head."""
        ids = np.arange(len(self.head))
        return ids + self.t["d2t"].astype(int) if "d2t" in self.t else ids

    def propose(
        self, hidden: np.ndarray, anchor: int, before: int, choose: Callable[[np.ndarray], int]
    ) -> tuple[list[int], list[np.ndarray], np.ndarray | None]:
        """Tokens, the logits [Vd] each was chosen from, and confidences, in order.

        choose: logits [Vd] -> row of the head.
        """
        traits, ids, first = self.traits, self.ids(), self.traits.first
        heads = f"{traits.prefix}markov_head"
        base, tokens, rows = self.base(hidden), [], []
        if traits.chain == "xpress":
            for refined in self.refine(hidden, base, anchor, before):
                rows.append(refined)
                tokens.append(int(ids[choose(refined)]))
            return tokens, rows, None
        state, previous, embedded = np.zeros(1), anchor, []
        if traits.chain in ("vanilla", "gated", "rnn"):
            w1 = self.t[f"{heads}.markov_w1.weight"]
            state = np.zeros(w1.shape[1])
        for k in range(len(hidden)):
            h, logits = hidden[k], base[k]
            if traits.chain in ("vanilla", "gated", "rnn"):
                e = w1[previous]
                f = e
                if traits.chain == "gated":
                    f = sigmoid(self.linear(f"{heads}.gate_proj", np.concatenate([h, e]))) * e
                if traits.chain == "rnn":
                    joint = np.concatenate([state, e, h])
                    a, c, o = np.split(self.linear(f"{heads}.joint_proj", joint), 3)
                    state = sigmoid(a) * state + (1 - sigmoid(a)) * np.tanh(c)
                    f = np.tanh(o)
                logits = logits + self.t[f"{heads}.markov_w2.weight"] @ f
            if k < first:
                continue  # but a recurrence ran over it
            if traits.chain in ("vanilla", "gated", "rnn"):
                embedded.append(e)
            if traits.chain == "dfly":
                name = "hidden_correction"
                z = np.concatenate(
                    [
                        self.norm(f"{name}.hidden_norm", h),
                        self.norm(f"{name}.embed_norm", self.embed[previous] * self.scale),
                    ]
                )
                inner = silu(self.linear(f"{name}.gate_proj", z))
                inner = inner * self.linear(f"{name}.up_proj", z)
                logits = self.base(h + self.linear(f"{name}.down_proj", inner))
            if traits.top_k:
                logits = self.select(h, logits, previous)
            rows.append(logits)
            previous = int(ids[choose(logits)])
            tokens.append(previous)
        return tokens, rows, self.confidence(hidden[first:], embedded)

    def confidence(self, hidden: np.ndarray, embedded: list[np.ndarray]) -> np.ndarray | None:
        name = f"{self.traits.prefix}confidence_head.proj"
        if f"{name}.weight" not in self.t:
            return None
        wide = self.t[f"{name}.weight"].shape[1] > hidden.shape[1]
        x = np.concatenate([hidden, np.stack(embedded)], axis=1) if wide else hidden
        return sigmoid(self.linear(name, x)[:, 0])

    def select(self, h: np.ndarray, logits: np.ndarray, previous: int) -> np.ndarray:
        """Scores of the likeliest tokens by DFlash 2's selector; all others are out."""
        name = "candidate_selector"
        top = np.argsort(-logits)[: self.traits.top_k]
        driven = self.t[f"{name}.predecessor_codebook"][previous] * self.linear(
            f"{name}.hidden_projection", h
        )
        scores = np.full_like(logits, -np.inf)
        scores[top] = logits[top] + self.t[f"{name}.successor_codebook"][top] @ driven
        return scores

    def refine(self, hidden: np.ndarray, base: np.ndarray, anchor: int, before: int) -> np.ndarray:
        """XPress: the proposing rows' logits after all passes, [P, Vd]."""
        name, ids, first = "refiner_head", self.ids(), self.traits.first
        mean = np.broadcast_to(hidden.mean(0), hidden.shape)
        fixed = [self.linear(f"{name}.down_h", hidden), self.linear(f"{name}.down_g", mean)]
        mix = np.tril(self.t[f"{name}.mix_l"])
        refined = base
        for _ in range(self.traits.passes):
            likeliest = ids[refined.argmax(-1)]
            known = [before, anchor] if first else [anchor]
            previous = np.array([*known, *likeliest[first:]])[: len(hidden)]
            x = np.concatenate([*fixed, self.t[f"{name}.token_embed.weight"][previous]], axis=-1)
            x = self.linear(f"{name}.in_proj", x)
            x = x + np.einsum("ckj,jc->kc", mix, x)
            inner = silu(self.linear(f"{name}.mlp_gate", x)) * self.linear(f"{name}.mlp_up", x)
            x = x + self.linear(f"{name}.mlp_down", inner)
            refined = base + self.linear(f"{name}.readout", x)
        return refined[first:]
