"""What tiny checkpoints of every packaging are made of, and how one is written.

What each means (`Traits`) is written down by hand, apart from the library's readers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

H, LAYERS, HEADS, KV, DIM, FF, V, TAPS, RANK, BLOCK = 32, 2, 4, 2, 8, 48, 64, 3, 8, 5
DEPTH = 8  # of the target
IDS, MASK = [1, 4, 6], 61
FULL, SLIDING = "full_attention", "sliding_attention"

Json = dict[str, Any]


@dataclass(frozen=True)
class Traits:
    """What a checkpoint means, for the plain reference.

    fc, hidden_norm, norm: the names of these in the file.
    first: the first row that proposes.
    sees: (context rows, row, layer) -> the first context row that is visible.
    """

    fc: str = "fc"
    hidden_norm: str = "hidden_norm"
    norm: str = "norm"
    prefix: str = ""  # before the heads' names
    first: int = 1
    eps: float = 1e-6
    kv: int = KV
    dim: int = DIM
    theta: float = 1e4
    pairs: bool = False  # neighbours rotate
    rotated: int | None = None  # pairs that rotate, of a proportional rope
    frequencies: Callable[[], tuple[np.ndarray, float]] | None = None
    sees: Callable[[int, int, int], int] = lambda n, row, layer: 0
    causal: tuple[bool, ...] = (False,) * LAYERS
    scale: float | None = None
    fused: bool = False
    values_from_keys: bool = False
    value_norm: bool = False
    sandwich: bool = False
    gelu: bool = False
    gating: str | None = None
    tap_norms: bool = False
    layer_norms: bool = False
    fusion: bool = False
    embedding_scale: float = 1.0
    tied: bool = False
    cap: float | None = None
    chain: str | None = None
    passes: int = 0
    convolved: bool = False
    top_k: int = 0


@dataclass(frozen=True)
class Checkpoint:
    config: Json
    shapes: dict[str, tuple[int, ...]]
    traits: Traits
    reduced: int = 0  # rows of a draft vocabulary
    own: tuple[str, ...] = field(default=())


def window(width: int) -> Callable[[int, int, int], int]:
    """Visible at a distance below the width."""
    return lambda n, row, layer: max(0, n + row - width + 1)


def anchored(width: int) -> Callable[[int, int, int], int]:
    """Every row sees the last rows of the context, as speculators trains."""
    return lambda n, row, layer: max(0, n - width)


def flat(**more: Any) -> Json:
    config = {
        "hidden_size": H,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": DIM,
        "intermediate_size": FF,
        "vocab_size": V,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 4096,
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "block_size": BLOCK,
        "num_target_layers": DEPTH,
    }
    return {key: value for key, value in {**config, **more}.items() if value is not ...}


def backbone(
    t: Traits, bias: bool = False, sinks: bool = False, layers: int = LAYERS
) -> dict[str, tuple[int, ...]]:
    q, k = HEADS * t.dim, t.kv * t.dim
    found: dict[str, tuple[int, ...]] = {
        f"{t.fc}.weight": (H, TAPS * H),
        f"{t.hidden_norm}.weight": (H,),
        f"{t.norm}.weight": (H,),
    }
    for i in range(layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (H,),
            "post_attention_layernorm.weight": (H,),
            "self_attn.o_proj.weight": (H, q),
            "self_attn.q_norm.weight": (t.dim,),
            "self_attn.k_norm.weight": (t.dim,),
            "mlp.gate_proj.weight": (FF, H),
            "mlp.up_proj.weight": (FF, H),
            "mlp.down_proj.weight": (H, FF),
        }
        if t.fused:
            layer["self_attn.qkv_proj.weight"] = (q + 2 * k, H)
            if bias:
                layer["self_attn.qkv_proj.bias"] = (q + 2 * k,)
        else:
            rows = {"q": q, "k": k} | ({} if t.values_from_keys else {"v": k})
            layer |= {f"self_attn.{n}_proj.weight": (m, H) for n, m in rows.items()}
            if bias:
                biases = {**rows, "o": H}
                layer |= {f"self_attn.{n}_proj.bias": (m,) for n, m in biases.items()}
        if t.gating:
            layer["self_attn.g_proj.weight"] = (HEADS if t.gating == "per-head" else q, H)
        if sinks:
            layer["self_attn.attention_sink_bias"] = (HEADS,)
        if t.sandwich:
            layer["pre_feedforward_layernorm.weight"] = (H,)
            layer["post_feedforward_layernorm.weight"] = (H,)
            layer["layer_scalar"] = (1,)
        if t.convolved:
            for conv in ("attention_conv", "mlp_conv"):
                layer[f"{conv}.base_kernel"] = (2, 2, H)
                layer[f"{conv}.kernel_projection.weight"] = (4 * H // 8, H)
        found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if t.tap_norms:
        found |= {f"aux_hidden_norms.{i}.weight": (H,) for i in range(TAPS)}
    if t.fusion:
        found["layer_fusion_weights"] = (layers, TAPS)
    return found


def chain(
    kind: str, rows: int = V, confidence: str | None = None, prefix: str = ""
) -> dict[str, tuple[int, ...]]:
    """A Markov chain, and a confidence head: "with" or "without" its embedding, or None."""
    found: dict[str, tuple[int, ...]] = {
        "markov_head.markov_w1.weight": (V, RANK),
        "markov_head.markov_w2.weight": (rows, RANK),
    }
    if kind == "gated":
        found["markov_head.gate_proj.weight"] = (RANK, H + RANK)
        found["markov_head.gate_proj.bias"] = (RANK,)
    if kind == "rnn":
        found["markov_head.joint_proj.weight"] = (3 * RANK, 2 * RANK + H)
        found["markov_head.joint_proj.bias"] = (3 * RANK,)
    if confidence:
        found["confidence_head.proj.weight"] = (1, H + RANK * (confidence == "with"))
        found["confidence_head.proj.bias"] = (1,)
    return {prefix + name: shape for name, shape in found.items()}


OWN = {"embed_tokens.weight": (V, H), "lm_head.weight": (V, H)}
EMBEDDING = {"embed_tokens.weight": (V, H)}


def tensors(case: Checkpoint, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by their published names, float32."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for name, shape in case.shapes.items():
        array = rng.standard_normal(shape)
        one_dimensional = len(shape) == 1 and not name.endswith("bias")
        scale = 0.1 if one_dimensional else 0.7 if len(shape) == 1 else shape[-1] ** -0.5
        array = array * scale + one_dimensional * (name != "mask_embedding")
        found[name] = array.astype(np.float32)
    for name in ("embed_tokens.weight", "lm_head.weight", "markov_head.markov_w1.weight"):
        if name in found:
            found[name] *= 3
    if case.reduced:
        ids = np.sort(rng.choice(V, case.reduced, replace=False))
        found["d2t"] = (ids - np.arange(case.reduced)).astype(np.int64)
        found["t2d"] = np.isin(np.arange(V), ids)
    return found


def write(directory: Path, case: Checkpoint, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a case as its packaging has it; returns the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(case.config))
    found = tensors(case, seed)
    arrays = {name: mx.array(array) for name, array in found.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, {"format": "pt"})
    return found
