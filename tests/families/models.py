"""Tiny random models of every family, float32, with sliding windows of 16 so that they wrap."""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

WINDOW = 16
VOCAB = 101
GAIN = 3.0

_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

_DENSE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
_HEADS = {"head_dim": 8}
_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_MLA: dict[str, Any] = dict(
    _DENSE,
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    rope_scaling=None,
)
_DSA: dict[str, Any] = dict(_MLA, index_head_dim=16, index_n_heads=2, index_topk=8)
_GDN: dict[str, Any] = dict(
    _DENSE,
    head_dim=8,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    full_attention_interval=2,
)
_GDN_ROPE = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_GEMMA4: dict[str, Any] = dict(
    _DENSE,
    head_dim=8,
    global_head_dim=16,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8,
    num_hidden_layers=6,
    num_kv_shared_layers=2,
    sliding_window=WINDOW,
    layer_types=[
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ],
)
_MAMBA_HYBRID: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_proj_bias": False,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
}

# family -> (mlx_lm module, configuration)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(_DENSE, tie_word_embeddings=False)),
    "qwen2": ("qwen2", dict(_DENSE)),
    "qwen3": ("qwen3", dict(_DENSE, **_HEADS, tie_word_embeddings=True)),
    "qwen3_moe": ("qwen3_moe", dict(_DENSE, **_HEADS, **_MOE, tie_word_embeddings=False)),
    "minimax": (
        "minimax",
        dict(
            _DENSE,
            head_dim=8,
            rotary_dim=4,
            num_experts_per_tok=2,
            num_local_experts=8,
            shared_intermediate_size=16,
        ),
    ),
    "glm4_moe": (
        "glm4_moe",
        dict(
            _DENSE,
            head_dim=8,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
            n_routed_experts=8,
            routed_scaling_factor=1.0,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            rope_scaling=None,
            use_qk_norm=True,
            tie_word_embeddings=False,
            attention_bias=False,
            partial_rotary_factor=0.5,
        ),
    ),
    "gemma2": ("gemma2", dict(_DENSE, head_dim=8, query_pre_attn_scalar=8.0)),
    "deepseek_v3": ("deepseek_v3", dict(_MLA)),
    "kimi_k25": ("kimi_k25", {"text_config": dict(_MLA)}),
    "deepseek_v32": ("deepseek_v32", dict(_DSA)),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        dict(
            _DSA,
            routed_scaling_factor=1.0,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            moe_layer_freq=1,
            attention_bias=False,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        ),
    ),
    "llama4": (
        "llama4",
        {
            "text_config": dict(
                _DENSE,
                model_type="llama4_text",
                head_dim=8,
                attention_bias=False,
                attention_chunk_size=WINDOW,
                interleave_moe_layer_step=2,
                intermediate_size_mlp=48,
                num_experts_per_tok=1,
                num_local_experts=4,
                rope_scaling=None,
                use_qk_norm=True,
            )
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            _DENSE,
            head_dim=8,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            layer_types=_SLIDING,
        ),
    ),
    "laguna": (
        "laguna",
        dict(
            _DENSE,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=_SLIDING,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    ),
    "step3p5": (
        "step3p5",
        dict(
            _DENSE,
            num_attention_groups=2,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=_SLIDING,
            moe_num_experts=8,
            moe_top_k=2,
            moe_intermediate_size=16,
            share_expert_dim=16,
            moe_layers_enum="1,2,3",
        ),
    ),
    "llama_sliding": ("llama", dict(_DENSE, sliding_window=WINDOW, layer_types=_SLIDING)),
    "mistral_sliding": (
        "llama",
        dict(
            _DENSE,
            model_type="mistral",
            sliding_window=WINDOW,
            layer_types=["full_attention"] + ["sliding_attention"] * 3,
        ),
    ),
    "ministral3": (
        "ministral3",
        dict(
            _DENSE,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=_SLIDING,
            rope_parameters={
                "rope_theta": 10000.0,
                "rope_type": "default",
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "gemma3_text": (
        "gemma3_text",
        dict(_DENSE, head_dim=8, sliding_window=WINDOW, sliding_window_pattern=2),
    ),
    "gemma4_text": ("gemma4_text", dict(_GEMMA4)),
    "gemma4": ("gemma4", {"vocab_size": VOCAB, "text_config": dict(_GEMMA4)}),
    "gemma3n": (
        "gemma3n",
        {
            "text_config": dict(
                _DENSE,
                model_type="gemma3n_text",
                head_dim=8,
                num_hidden_layers=6,
                num_kv_shared_layers=2,
                vocab_size_per_layer_input=VOCAB,
                sliding_window=WINDOW,
                rope_local_base_freq=10000.0,
                final_logit_softcapping=30.0,
                layer_types=["sliding_attention", "full_attention"] * 3,
                activation_sparsity_pattern=[0.5, 0.0] * 3,
                hidden_size_per_layer_input=8,
                altup_num_inputs=3,
                altup_coef_clip=120.0,
                altup_correct_scale=True,
                altup_active_idx=0,
                laurel_rank=4,
            )
        },
    ),
    "muse_glimmer": (
        "muse_glimmer",
        dict(_DENSE, head_dim=8, sliding_window=WINDOW, layer_types=_SLIDING),
    ),
    "qwen3_next": (
        "qwen3_next",
        dict(
            _GDN,
            **_MOE,
            shared_expert_intermediate_size=16,
            partial_rotary_factor=0.5,
        ),
    ),
    "qwen3_5": ("qwen3_5", {"text_config": dict(_GDN, rope_parameters=_GDN_ROPE)}),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {
            "text_config": dict(
                _GDN,
                num_experts=8,
                num_experts_per_tok=2,
                decoder_sparse_step=1,
                shared_expert_intermediate_size=16,
                moe_intermediate_size=16,
                rope_parameters=_GDN_ROPE,
            )
        },
    ),
    "lfm2": (
        "lfm2",
        dict(
            _DENSE,
            norm_eps=1e-6,
            conv_bias=False,
            conv_L_cache=4,
            block_dim=32,
            block_multiple_of=8,
            block_ffn_dim_multiplier=1.0,
            block_auto_adjust_ff_dim=False,
            block_ff_dim=48,
            full_attn_idxs=[1, 3],
        ),
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        dict(
            _DENSE,
            **_MAMBA_HYBRID,
            attention_bias=False,
            embedding_multiplier=3.0,
            attention_multiplier=0.3,
            logits_scaling=0.5,
            residual_multiplier=0.9,
            layer_types=["mamba", "attention", "mamba", "attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
        ),
    ),
    "kimi_linear": (
        "kimi_linear",
        dict(
            _DENSE,
            num_key_value_heads=4,
            head_dim=8,
            linear_attn_config={
                "kda_layers": [1, 3],
                "num_heads": 4,
                "head_dim": 8,
                "short_conv_kernel_size": 4,
            },
            model_max_length=4096,
            num_experts=8,
            moe_intermediate_size=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            mla_use_nope=True,
            num_experts_per_token=2,
            num_shared_experts=1,
            first_k_dense_replace=1,
        ),
    ),
    "nemotron_h": (
        "nemotron_h",
        dict(
            _DENSE,
            attention_bias=False,
            head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=8,
            mamba_proj_bias=False,
            ssm_state_size=8,
            conv_kernel=4,
            n_groups=2,
            mlp_bias=False,
            layer_norm_epsilon=1e-5,
            use_bias=False,
            use_conv_bias=True,
            hybrid_override_pattern=["M", "-", "*", "M", "-", "*"],
        ),
    ),
    "mamba2": (
        "mamba2",
        {
            "num_heads": 8,
            "head_dim": 8,
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "state_size": 8,
            "num_hidden_layers": 4,
            "layer_norm_epsilon": 1e-5,
            "conv_kernel": 4,
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": True,
            "tie_word_embeddings": True,
            "time_step_limit": (0.001, 100.0),
            "time_step_rank": "auto",
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        dict(
            _DENSE,
            head_dim=8,
            mamba_d_head=8,
            mamba_d_ssm=32,
            mamba_d_state=8,
            mamba_n_heads=4,
            mamba_n_groups=1,
        ),
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        dict(
            _DENSE,
            num_key_value_heads=1,
            attention_bias=False,
            conv1d_width=4,
            logits_soft_cap=30.0,
            attention_window_size=WINDOW,
            block_types=["recurrent", "attention"],
        ),
    ),
    "rwkv7": (
        "rwkv7",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "norm_eps": 1e-5,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "a_low_rank_dim": 4,
            "v_low_rank_dim": 4,
            "gate_low_rank_dim": 4,
            "decay_low_rank_dim": 4,
        },
    ),
    "deepseek_v41": (
        "deepseek_v41",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 32,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "o_groups": 2,
            "o_lora_rank": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-6,
            "sliding_window": WINDOW,
            "compress_ratios": (0, 4, 4, 4),
            "kv_source_layer_ids": (1,),
            "index_source_layer_ids": (1,),
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_topk": 8,
            "hc_mult": 2,
        },
    ),
    "nanbeige": ("nanbeige", dict(_DENSE, num_hidden_layers=2, num_loops=2)),
    # Families that nothing was known about beforehand.
    "jamba": (
        "jamba",
        dict(
            _DENSE,
            attn_layer_offset=1,
            attn_layer_period=2,
            expert_layer_offset=1,
            expert_layer_period=2,
            mamba_d_conv=4,
            mamba_d_state=8,
            mamba_expand=2,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "mamba": (
        "mamba",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "state_size": 8,
            "num_hidden_layers": 4,
            "conv_kernel": 4,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_rank": 4,
        },
    ),
    "plamo2": (
        "plamo2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size_per_head": 8,
            "mamba_d_state": 8,
            "mamba_num_heads": 4,
            "intermediate_size": 48,
            "vocab_size": VOCAB,
        },
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        dict(
            _DENSE,
            linear_num_key_heads=4,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_conv_kernel_dim=4,
            linear_allow_neg_eigval=True,
            tie_word_embeddings=False,
            attention_bias=False,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
    ),
    "longcat_flash_ngram": (
        "longcat_flash_ngram",
        {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "num_layers": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": 4096,
            "num_attention_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "routed_scaling_factor": 1.0,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "ngram_vocab_size_ratio": 3,
        },
    ),
    "baichuan_m1": (
        "baichuan_m1",
        dict(_DENSE, sliding_window=WINDOW, sliding_window_layers=[0, 2], conv_window=2),
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        dict(
            _DENSE,
            num_key_value_heads=4,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            layer_group_size=2,
            group_norm_size=2,
            routed_scaling_factor=1.0,
            head_dim=8,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    ),
    "bailing_moe_linear": (
        "bailing_moe_linear",
        dict(
            _DENSE,
            num_key_value_heads=4,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            layer_group_size=2,
            group_norm_size=2,
            head_dim=8,
        ),
    ),
    "gear": (
        "gear",
        dict(
            _DENSE,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"],
        ),
    ),
    "kimi_k3": (
        "kimi_k3",
        {
            "text_config": dict(
                _DENSE,
                num_key_value_heads=4,
                activation_situ_beta=1.0,
                attn_res_block_size=2,
                linear_attn_config={
                    "kda_layers": [1, 3],
                    "full_attn_layers": [2, 4],
                    "num_heads": 4,
                    "head_dim": 8,
                    "short_conv_kernel_size": 4,
                    "gate_lower_bound": -5.0,
                },
                num_experts=8,
                moe_intermediate_size=16,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_nope_head_dim=8,
                qk_rope_head_dim=8,
                v_head_dim=8,
                num_experts_per_token=2,
                num_shared_experts=1,
                first_k_dense_replace=1,
            )
        },
    ),
}

# Heads wide enough for mlx-lm to quantize a cache in groups of 32.
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_wide": ("llama", dict(_DENSE, head_dim=32)),
    "qwen3_5_wide": (
        "qwen3_5",
        {"text_config": dict(_GDN, head_dim=32, rope_parameters=_GDN_ROPE)},
    ),
    "llama4_wide": (
        "llama4",
        {"text_config": {**CONFIGS["llama4"][1]["text_config"], "head_dim": 32}},
    ),
}

# Families that cannot work, with a word of the reason.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "iquestloopcoder": (
        "iquestloopcoder",
        dict(_DENSE, head_dim=8, loop_num=2, loop_window_size=WINDOW),
        "without calling the layers",
    ),
}


def _lively(path: str, value: Any) -> Any:
    """Give constant parameters random values, so that no part of a model is idle."""
    if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
        return value
    noise = mx.random.normal(value.shape)
    if value.ndim and bool(mx.all(value == value.flatten()[0])):
        return value + 0.2 * noise
    if value.ndim >= 2 and "embed" not in path and "lm_head" not in path:
        # Wider than the default, so that the text depends on the context.
        return value * GAIN
    return value


def configure(module: str, config: dict[str, Any]) -> nn.Module:
    """Build an mlx-lm model from its module name and configuration."""
    source = importlib.import_module(f"mlx_lm.models.{module}")
    config = {"model_type": module, **config}
    return source.Model(source.ModelArgs.from_dict(config))


HALF = "@bfloat16"


def _half(model: nn.Module) -> None:
    """Cast as mlx-lm does when it converts: what the family wants in float32 stays so."""
    wanted = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, value: Any) -> Any:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(mx.bfloat16) if floating and wanted(path) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def build(family: str, seed: int = 0) -> nn.Module:
    """A tiny random model of a family, evaluated; "family@bfloat16" for one in bfloat16."""
    family, _, half = family.partition("@")
    module, config = ({**CONFIGS, **WIDE}.get(family) or REFUSED[family])[:2]
    mx.random.seed(1000 + seed)
    model = configure(module, config)
    model.update(tree_map_with_path(_lively, model.parameters()))
    if half:
        _half(model)
    mx.eval(model.parameters())
    return model
