"""Tiny checkpoints of every packaging: the keys and tensor names are the published ones.

`CASES` has the variants that occur and those that the formats allow.
"""

from typing import Any

from tests.checkpoint_parts import (
    BLOCK,
    DEPTH,
    EMBEDDING,
    FULL,
    IDS,
    LAYERS,
    MASK,
    OWN,
    RANK,
    SLIDING,
    TAPS,
    Checkpoint,
    H,
    Json,
    Traits,
    V,
    anchored,
    backbone,
    chain,
    flat,
    window,
)
from tests.dspark_checkpoints import deepspec, gemma4, lfm2, nvidia, specforge


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
