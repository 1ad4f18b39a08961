"""Tiny checkpoints of DSpark's packagings: the keys and tensor names are the published ones."""

from dataclasses import replace
from typing import Any

import numpy as np

from tests.checkpoint_parts import (
    DEPTH,
    DIM,
    EMBEDDING,
    FULL,
    IDS,
    KV,
    LAYERS,
    MASK,
    OWN,
    RANK,
    SLIDING,
    Checkpoint,
    H,
    Traits,
    V,
    backbone,
    chain,
    flat,
    window,
)


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
