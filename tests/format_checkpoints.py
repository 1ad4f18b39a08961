"""Tiny checkpoints of every packaging: the keys and tensor names are the published ones.

`CASES` has the variants that occur and those that the formats allow, with what each one means
(`Traits`) written down by hand, apart from the library's readers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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


def deepspec(kind: str | None, confidence: str | None, **more: Any) -> Checkpoint:
    own = more.pop("own", OWN)
    config = flat(
        architectures=["Qwen3DSparkModel"],
        mask_token_id=MASK,
        target_layer_ids=IDS,
        markov_rank=RANK if kind else 0,
        enable_confidence_head=confidence is not None,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        # Of the target, and without a meaning here.
        sliding_window=16,
        partial_rotary_factor=0.25,
        draft_vocab_size=V,
        num_anchors=512,
        **more,
    )
    if kind:
        config["markov_head_type"] = kind
    if confidence:
        config["confidence_head_with_markov"] = confidence == "with"
    tied = more.get("tie_word_embeddings", False)
    traits = Traits(first=0, chain=kind, theta=1e6, tied=tied)
    heads = chain(kind, V, confidence) if kind else {}
    return Checkpoint(config, backbone(traits) | own | heads, traits)


def gemma4(k_eq_v: bool) -> Checkpoint:
    config = flat(
        architectures=["Gemma4DSparkModel"],
        model_type="gemma4_text",
        attention_k_eq_v=k_eq_v,
        head_dim=4,
        global_head_dim=DIM,
        num_global_key_value_heads=1,
        hidden_activation="gelu_pytorch_tanh",
        final_logit_softcapping=4.0,
        mask_token_id=4,
        target_layer_ids=IDS,
        markov_rank=RANK,
        markov_head_type="vanilla",
        enable_confidence_head=True,
        confidence_head_with_markov=True,
        rope_theta=...,
        rope_parameters={
            FULL: {"partial_rotary_factor": 0.5, "rope_theta": 1e6, "rope_type": "proportional"},
            SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
        },
    )
    traits = Traits(
        first=0,
        kv=1 if k_eq_v else KV,
        theta=1e6,
        rotated=2,
        scale=1.0,
        values_from_keys=k_eq_v,
        value_norm=True,
        sandwich=True,
        gelu=True,
        embedding_scale=H**0.5,
        cap=4.0,
        chain="vanilla",
    )
    return Checkpoint(config, backbone(traits) | OWN | chain("vanilla", V, "with"), traits)


def yarn() -> tuple[np.ndarray, float]:
    """HF's YaRN over DIM dimensions: base 1e4, factor 32, 64 positions, 32 and 1 rotations."""
    plain = 1e4 ** (-np.arange(0, DIM, 2) / DIM)

    def pair(rotations: float) -> float:
        return DIM * np.log(64 / (rotations * 2 * np.pi)) / (2 * np.log(1e4))

    low, high = max(np.floor(pair(32)), 0), min(np.ceil(pair(1)), DIM - 1)
    ramp = np.clip((np.arange(DIM // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain * (1 - ramp) + plain / 32 * ramp, 0.1 * np.log(32) + 1


def specforge(kind: str, sliding: bool = False, old: bool = False, scaled: bool = False):
    dflash = {
        "projector_type": "dspark",
        "attention_mode": "gqa",
        "mask_token_id": MASK,
        "target_layer_ids": IDS,
        "markov_rank": RANK,
        "markov_head_type": kind,
        "enable_confidence_head": True,
        "confidence_head_with_markov": not sliding,
    }
    config = flat(
        architectures=["DSparkDraftModel"],
        dflash_config=dflash,
        layer_types=[SLIDING, FULL] if sliding else [FULL] * LAYERS,
        sliding_window=9 if sliding else None,
    )
    if scaled:
        config["rope_parameters"] = {
            "rope_theta": 1e4,
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
        }
    prefix = "logit_head." if old else ""
    traits = Traits(first=0, chain=kind, prefix=prefix, frequencies=yarn if scaled else None)
    if sliding:
        slides = window(9)
        traits = replace(
            traits,
            causal=(True, False),
            sees=lambda n, row, layer: slides(n, row, layer) if layer == 0 else 0,
        )
    heads = chain(kind, V, "without" if sliding else "with", prefix)
    return Checkpoint(config, backbone(traits) | heads, traits)


def lfm2(**more: Any) -> Checkpoint:
    config = flat(
        architectures=["Lfm2DSparkDraftModel"],
        rms_norm_eps=1e-5,
        layer_types=[FULL] * LAYERS,
        markov_rank=RANK,
        markov_head_type="vanilla",
        enable_confidence_head=True,
        rope_is_neox_style=False,
        num_target_layers=...,
        dflash_config={
            "mask_token_id": MASK,
            "target_layer_ids": IDS,
            "num_target_layers": DEPTH,
        },
        **more,
    )
    traits = Traits(first=0, chain="vanilla", pairs=True, eps=1e-5)
    return Checkpoint(config, backbone(traits) | chain("vanilla", V, "with"), traits)


def nvidia(kind: str = "vanilla", width: int = 9) -> Checkpoint:
    config = flat(
        architectures=["Qwen3DSparkModel"],
        rope_theta=10000,
        rope_parameters=None,
        layer_types=[SLIDING] * LAYERS,
        sliding_window=width,
        markov_rank=RANK,
        markov_head_type=kind,
        dspark_markov_rank=RANK,
        dspark_fixup_head_type="markov",
        dspark_bonus_anchor=True,
        dflash_query_causal=True,
        attention_sink_bias=True,
        draft_vocab_size=None,
        has_embed_tokens=True,
        has_lm_head=False,
        mask_token_id=MASK,
        target_layer_ids=IDS,
        eagle_aux_hidden_state_layer_ids=[i + 1 for i in IDS],
        sample_from_anchor=False,
        dflash_config={
            "attention_sink_bias": True,
            "causal": True,
            "mask_token_id": MASK,
            "use_swa": True,
            "swa_window_size": width,
            "target_layer_ids": IDS,
            "sample_from_anchor": False,
        },
    )
    traits = Traits(chain=kind, causal=(True,) * LAYERS, sees=window(width))
    shapes = backbone(traits, sinks=True) | EMBEDDING | chain(kind)
    return Checkpoint(config, shapes, traits)


def speculators(
    kind: str,
    reduced: int = 0,
    *,
    head: str = "vanilla",
    anchor: bool | None = None,
    tokens: int | None = None,
    width: int | None = None,
    non_causal: bool | None = None,
    confidence: str | None = "with",
    own: dict | None = None,
    rope: Json | None = None,
    **more: Any,
) -> Checkpoint:
    """The backbone's config is nested; `anchor` None leaves sample_from_anchor out."""
    nested = flat(
        layer_types=[SLIDING if width else FULL] * LAYERS,
        sliding_window=width,
        rope_theta=...,
        rope_parameters=rope or {"rope_theta": 1e6, "rope_type": "default"},
        block_size=...,
        num_target_layers=...,
    )
    config: Json = {
        "architectures": [
            {"dflash2": "DFlash2DraftModel", "dspark": "DSparkDraftModel"}.get(
                kind, "DFlashDraftModel"
            )
        ],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "aux_hidden_state_layer_ids": [i + 1 for i in IDS],
        "block_size": BLOCK,
        "draft_vocab_size": reduced or V,
        "mask_token_id": MASK,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": nested,
        "speculators_config": {"algorithm": kind, "proposal_methods": []},
        **more,
    }
    if anchor is not None:
        config["sample_from_anchor"] = anchor
    if tokens is not None:
        config["speculators_config"]["proposal_methods"] = [{"speculative_tokens": tokens}]
    if non_causal is not None:
        config["sliding_window_non_causal"] = non_causal
    proposes = anchor if anchor is not None else tokens == BLOCK
    causal = bool(width) and not (kind == "dflash2" if non_causal is None else non_causal)
    traits = Traits(
        first=0 if proposes else 1,
        theta=(rope or {}).get(SLIDING, {"rope_theta": 1e6})["rope_theta"],
        causal=(causal,) * LAYERS,
        sees=anchored(width) if width else Traits.sees,
        chain=head if kind == "dspark" else kind if kind == "xpress" else None,
        passes=3 if kind == "xpress" else 0,
        convolved=kind == "dflash2",
        top_k=6 if kind == "dflash2" else 0,
    )
    shapes = backbone(traits) | (own or {})
    rows = reduced or V
    if kind == "dspark":
        config |= {
            "markov_rank": RANK,
            "markov_head_type": head,
            "enable_confidence_head": confidence is not None,
            "confidence_head_with_markov": confidence == "with",
        }
        shapes |= chain(head, rows, confidence)
    elif kind == "dflash2":
        config |= {
            "conv_kernel_size": 2,
            "conv_group_size": 8,
            "selector_rank": RANK,
            "selector_top_k": 6,
        }
        shapes |= {
            "candidate_selector.predecessor_codebook": (V, RANK),
            "candidate_selector.successor_codebook": (V, RANK),
            "candidate_selector.hidden_projection.weight": (RANK, H),
        }
    elif kind == "xpress":
        config |= {"xpress_rank": RANK, "xpress_mlp_ratio": 2, "num_jacobi_passes": 3}
        names = {
            "token_embed": (V, RANK),
            "down_h": (RANK, H),
            "down_g": (RANK, H),
            "in_proj": (RANK, 3 * RANK),
            "mlp_gate": (2 * RANK, RANK),
            "mlp_up": (2 * RANK, RANK),
            "mlp_down": (RANK, 2 * RANK),
            "readout": (rows, RANK),
        }
        shapes |= {f"refiner_head.{name}.weight": shape for name, shape in names.items()}
        shapes["refiner_head.mix_l"] = (RANK, BLOCK, BLOCK)
    if reduced:
        shapes["lm_head.weight"] = (reduced, H)
    return Checkpoint(config, shapes, traits, reduced)


VERIFIER = {
    "embed_tokens.weight": (V, H),
    "verifier_lm_head.weight": (V, H),
    "verifier_norm.weight": (H,),
}


def laguna(gating: Any, bias: bool = False) -> Checkpoint:
    config = flat(
        architectures=["DFlashLagunaForCausalLM"],
        model_type="laguna",
        gating=gating,
        qkv_bias=bias,
        layer_types=[SLIDING] * LAYERS,
        sliding_window=9,
        sliding_windows=[9] * LAYERS,
        rope_theta=5e5,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
        block_size=...,
        num_target_layers=...,
        eagle_aux_hidden_state_layer_ids=[i + 1 for i in IDS],
        dflash_config={
            "block_size": BLOCK,
            "causal": True,
            "mask_token_id": MASK,
            "num_target_layers": DEPTH,
            "target_layer_ids": IDS,
        },
    )
    traits = Traits(
        theta=5e5,
        fused=True,
        gating=gating if gating in ("per-head", "per-element") else None,
        tap_norms=True,
        layer_norms=True,
        causal=(True,) * LAYERS,
        sees=window(9),
    )
    return Checkpoint(config, backbone(traits, bias), traits)


def muse(own: dict | None = None) -> Checkpoint:
    config = flat(
        architectures=["MuseGlimmerAssistantModel"],
        model_type="muse_glimmer_assistant",
        mask_token_id=MASK,
        target_layer_ids=IDS,
        layer_types=[SLIDING] * LAYERS,
        sliding_window=9,
        rms_norm_eps=1e-5,
        rope_theta=...,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
        vocab_size=...,
        num_target_layers=...,
        tie_word_embeddings=...,
    )
    traits = Traits(
        fc="encoder.fc",
        hidden_norm="encoder.output_norm_enc",
        eps=1e-5,
        theta=5e5,
        sees=window(10),  # a distance of 9 is still seen
    )
    return Checkpoint(config, backbone(traits) | (own or {}), traits)


def dfly(corrected: bool = True) -> Checkpoint:
    config = flat(
        architectures=["DFlyDraftModel"],
        mask_token_id=MASK,
        target_layer_ids=IDS,
        num_target_layers=TAPS,
        target_num_hidden_layers=DEPTH,
        target_hidden_size=H,
        enable_hidden_correction=corrected,
        hidden_correction_intermediate_size=40,
    )
    traits = Traits(
        fc="context_proj",
        hidden_norm="context_norm",
        norm="final_norm",
        fusion=True,
        chain="dfly" if corrected else None,
    )
    shapes = backbone(traits)
    if corrected:
        shapes |= {
            "hidden_correction.hidden_norm.weight": (H,),
            "hidden_correction.embed_norm.weight": (H,),
            "hidden_correction.gate_proj.weight": (40, 2 * H),
            "hidden_correction.up_proj.weight": (40, 2 * H),
            "hidden_correction.down_proj.weight": (H, 40),
        }
    return Checkpoint(config, shapes, traits)


def zlab(
    own: dict | None = None, sinks: bool = False, bias: bool = False, **dflash: Any
) -> Checkpoint:
    """DFlash 1 with keys of its kin inside dflash_config."""
    config = flat(
        architectures=["DFlashDraftModel"],
        attention_bias=bias,
        dflash_config={"mask_token_id": MASK, "target_layer_ids": IDS, **dflash},
    )
    causal = dflash.get("causal", False)
    width = dflash.get("swa_window_size") if dflash.get("use_swa") else None
    traits = Traits(
        causal=(causal,) * LAYERS,
        sees=window(width) if width else Traits.sees,
        chain="vanilla" if dflash.get("markov_rank") else None,
    )
    shapes = backbone(traits, bias, sinks) | (own or {})
    if dflash.get("markov_rank"):
        shapes |= chain("vanilla")
    return Checkpoint(config, shapes, traits)


CASES: dict[str, Checkpoint] = {
    **{
        f"DeepSpec, {kind}, confidence {confidence}": deepspec(kind, confidence)
        for kind in ("vanilla", "gated", "rnn")
        for confidence in (None, "with", "without")
    },
    "DeepSpec, no chain": deepspec(None, None),
    "DeepSpec, nothing of its own": deepspec("vanilla", "with", own={}),
    "DeepSpec, tied": deepspec("vanilla", None, own=EMBEDDING, tie_word_embeddings=True),
    "DeepSpec, Gemma 4, values from keys": gemma4(True),
    "DeepSpec, Gemma 4, v_proj": gemma4(False),
    **{f"SpecForge, {kind}": specforge(kind) for kind in ("vanilla", "gated", "rnn")},
    "SpecForge, YaRN": specforge("vanilla", scaled=True),
    "SpecForge, sliding": specforge("vanilla", sliding=True),
    "SpecForge, old names": specforge("gated", old=True),
    "LiquidAI": lfm2(),
    **{f"NVIDIA, {kind}": nvidia(kind) for kind in ("vanilla", "gated", "rnn")},
    "speculators DFlash": speculators("dflash"),
    "speculators DFlash, reduced, sliding": speculators("dflash", 40, width=9),
    "speculators DFlash, sliding, not causal": speculators("dflash", width=9, non_causal=True),
    "speculators DFlash, old": speculators("dflash", tokens=BLOCK - 1, own=VERIFIER),
    "speculators DFlash 2": speculators("dflash2", width=9),
    **{
        f"speculators DSpark, {head}, {rows}, {reduced or V} tokens": speculators(
            "dspark", reduced, head=head, anchor=rows == "anchor"
        )
        for head in ("vanilla", "gated", "rnn")
        for rows in ("anchor", "fill")
        for reduced in (0, 40)
    },
    "speculators DSpark, rows by tokens": speculators("dspark", tokens=BLOCK - 1, width=9),
    "speculators DSpark, all rows by tokens": speculators("dspark", 40, tokens=BLOCK),
    "speculators DSpark, rope by kind": speculators(
        "dspark",
        anchor=True,
        width=9,
        confidence=None,
        rope={
            SLIDING: {"rope_theta": 1e5, "rope_type": "default"},
            FULL: {"rope_theta": 1e6, "rope_type": "default"},
        },
    ),
    "XPress": speculators("xpress", anchor=False),
    "XPress, anchor, reduced": speculators("xpress", 40, anchor=True),
    "Laguna": laguna("per-head"),
    "Laguna, per element, bias": laguna("per-element", bias=True),
    "Laguna, no gates": laguna("off"),
    "Muse assistant": muse(),
    "Muse assistant, own embedding": muse(EMBEDDING),
    "DFly": dfly(),
    "DFly, not corrected": dfly(False),
    "DFlash, causal": zlab(causal=True),
    "DFlash, MiMo's windows, sinks and mask": zlab(
        {"mask_embedding": (H,)}, sinks=True, use_swa=True, swa_window_size=9
    ),
    "DFlash, own embedding and head, bias": zlab(OWN, bias=True),
    "DFlash with a chain": zlab(markov_rank=RANK, markov_head_type="vanilla"),
}


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
