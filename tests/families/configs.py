"""Configurations of tiny models, one a family, made of what families share.

Sliding windows are of 16 tokens, so that they wrap.
"""

from typing import Any

Config = dict[str, Any]

WINDOW = 16
VOCAB = 101

FULL, SLIDING = "full_attention", "sliding_attention"

SIZES: Config = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": VOCAB}
DENSE: Config = SIZES | {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
HEADS: Config = DENSE | {"head_dim": 8}
# As many key-value heads as query heads.
MULTI: Config = DENSE | {"num_key_value_heads": 4}

WINDOWED: Config = {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL] * 2}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
NO_BIAS: Config = {"attention_bias": False}
DEFAULT_ROPE: Config = {"rope_theta": 10000.0, "rope_type": "default"}

# Mixtures of experts.
TWO_OF: Config = {"num_experts_per_tok": 2}
EXPERTS: Config = TWO_OF | {"num_experts": 8, "moe_intermediate_size": 16}
SPARSE: Config = EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
LOCAL_EXPERTS: Config = TWO_OF | {"num_local_experts": 8}
SHARED_EXPERT: Config = {"shared_expert_intermediate_size": 16}
GROUPED: Config = {"n_group": 1, "topk_group": 1}
FIRST_DENSE: Config = {"first_k_dense_replace": 1}
ROUTED: Config = (
    TWO_OF
    | FIRST_DENSE
    | {
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "rope_scaling": None,
    }
)

# Latent attention.
LATENT: Config = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MLA: Config = MULTI | ROUTED | LATENT
DSA: Config = MLA | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}

# Recurrent mixers.
LINEAR: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
GDN: Config = HEADS | LINEAR | {"full_attention_interval": 2}
GDN_ROPE: Config = {
    "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}
SSM: Config = {
    "state_size": 8,
    "conv_kernel": 4,
    "intermediate_size": 64,
    "use_bias": False,
    "use_conv_bias": True,
}
KDA: Config = {"kda_layers": [1, 3], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4}
KIMI_EXPERTS: Config = FIRST_DENSE | {
    "num_experts": 8,
    "moe_intermediate_size": 16,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
}
BAILING: Config = (
    MULTI
    | EXPERTS
    | GROUPED
    | FIRST_DENSE
    | {"head_dim": 8, "num_shared_experts": 1, "layer_group_size": 2, "group_norm_size": 2}
)

GEMMA_LAYERS: Config = {
    "head_dim": 8,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "sliding_window": WINDOW,
    "layer_types": [SLIDING, FULL] * 3,
}
GEMMA4: Config = DENSE | GEMMA_LAYERS | {"global_head_dim": 16}

LLAMA4: Config = (
    HEADS
    | NO_BIAS
    | {
        "model_type": "llama4_text",
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
        "rope_scaling": None,
        "use_qk_norm": True,
    }
)


def inside(config: Config, **outside: Any) -> Config:
    """A text model inside another."""
    return {"text_config": config, **outside}


# family -> configuration; the family is mlx-lm's module where MODULES does not say otherwise.
_CONFIGS: dict[str, Config] = {
    "llama": DENSE | UNTIED,
    "qwen2": DENSE,
    "qwen3": HEADS | TIED,
    "qwen3_moe": HEADS | SPARSE | UNTIED,
    "minimax": HEADS | LOCAL_EXPERTS | {"rotary_dim": 4, "shared_intermediate_size": 16},
    "glm4_moe": HEADS
    | ROUTED
    | GROUPED
    | UNTIED
    | NO_BIAS
    | {
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "gemma2": HEADS | {"query_pre_attn_scalar": 8.0},
    "deepseek_v3": MLA,
    "kimi_k25": inside(MLA),
    "deepseek_v32": DSA,
    "glm_moe_dsa": DSA
    | GROUPED
    | NO_BIAS
    | {
        "routed_scaling_factor": 1.0,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "rope_parameters": DEFAULT_ROPE,
    },
    "llama4": inside(LLAMA4),
    "gpt_oss": HEADS
    | LOCAL_EXPERTS
    | WINDOWED
    | {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        }
    },
    "laguna": HEADS | WINDOWED | EXPERTS | SHARED_EXPERT,
    "step3p5": HEADS
    | WINDOWED
    | {
        "num_attention_groups": 2,
        "moe_num_experts": 8,
        "moe_top_k": 2,
        "moe_intermediate_size": 16,
        "share_expert_dim": 16,
        "moe_layers_enum": "1,2,3",
    },
    "llama_sliding": DENSE | WINDOWED,
    "mistral_sliding": DENSE
    | WINDOWED
    | {"model_type": "mistral", "layer_types": [FULL] + [SLIDING] * 3},
    "ministral3": HEADS
    | WINDOWED
    | {
        "rope_parameters": DEFAULT_ROPE
        | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    },
    "gemma3_text": HEADS | {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "gemma4_text": GEMMA4,
    "gemma4": inside(GEMMA4, vocab_size=VOCAB),
    "gemma3n": inside(
        DENSE
        | GEMMA_LAYERS
        | {
            "model_type": "gemma3n_text",
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.5, 0.0] * 3,
            "altup_num_inputs": 3,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 4,
        }
    ),
    "muse_glimmer": HEADS | WINDOWED,
    "qwen3_next": GDN | SPARSE | SHARED_EXPERT | {"partial_rotary_factor": 0.5},
    "qwen3_5": inside(GDN | GDN_ROPE),
    "qwen3_5_moe": inside(GDN | GDN_ROPE | EXPERTS | SHARED_EXPERT | {"decoder_sparse_step": 1}),
    "lfm2": DENSE
    | {
        "norm_eps": 1e-6,
        "conv_bias": False,
        "conv_L_cache": 4,
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 48,
        "full_attn_idxs": [1, 3],
    },
    "granitemoehybrid": DENSE
    | TWO_OF
    | NO_BIAS
    | {
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_proj_bias": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.9,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
    },
    "kimi_linear": MULTI
    | KIMI_EXPERTS
    | {
        "head_dim": 8,
        "linear_attn_config": KDA,
        "model_max_length": 4096,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "mla_use_nope": True,
    },
    "nemotron_h": HEADS
    | NO_BIAS
    | {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "n_groups": 2,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "-", "*"] * 2,
    },
    "mamba2": SIZES
    | SSM
    | TIED
    | {
        "num_heads": 8,
        "head_dim": 8,
        "layer_norm_epsilon": 1e-5,
        "n_groups": 1,
        "time_step_limit": (0.001, 100.0),
        "time_step_rank": "auto",
    },
    "falcon_h1": HEADS
    | {
        "mamba_d_head": 8,
        "mamba_d_ssm": 32,
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_n_groups": 1,
    },
    "recurrent_gemma": DENSE
    | NO_BIAS
    | {
        "num_key_value_heads": 1,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": SIZES
    | {
        "intermediate_size": 64,
        "norm_eps": 1e-5,
        "head_dim": 8,
        "a_low_rank_dim": 4,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 4,
        "decay_low_rank_dim": 4,
    },
    "deepseek_v41": SIZES
    | TWO_OF
    | {
        "num_attention_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
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
    "nanbeige": DENSE | {"num_hidden_layers": 2, "num_loops": 2},
    # Families that nothing was known about beforehand.
    "jamba": DENSE
    | TWO_OF
    | {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 4,
    },
    "mamba": SIZES | SSM | {"time_step_rank": 4},
    "plamo2": SIZES
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size_per_head": 8,
        "mamba_d_state": 8,
        "mamba_num_heads": 4,
        "intermediate_size": 48,
    },
    "olmo_hybrid": DENSE
    | LINEAR
    | UNTIED
    | NO_BIAS
    | {
        "linear_num_key_heads": 4,
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", FULL] * 2,
    },
    "longcat_flash_ngram": LATENT
    | {
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
        "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 3,
    },
    "baichuan_m1": DENSE
    | {"sliding_window": WINDOW, "sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": BAILING | LATENT | {"routed_scaling_factor": 1.0},
    "bailing_moe_linear": BAILING | {"norm_topk_prob": True},
    "gear": HEADS | WINDOWED | {"layer_types": ["conv_mixer", SLIDING, "conv_mixer", FULL]},
    "kimi_k3": inside(
        MULTI
        | LATENT
        | KIMI_EXPERTS
        | {
            "activation_situ_beta": 1.0,
            "attn_res_block_size": 2,
            "linear_attn_config": KDA | {"full_attn_layers": [2, 4], "gate_lower_bound": -5.0},
        }
    ),
}
MODULES = {"llama_sliding": "llama", "mistral_sliding": "llama"}

# family -> (mlx_lm module, configuration)
CONFIGS: dict[str, tuple[str, Config]] = {
    family: (MODULES.get(family, family), config) for family, config in _CONFIGS.items()
}

# Heads wide enough for mlx-lm to quantize a cache in groups of 32.
WIDE: dict[str, tuple[str, Config]] = {
    "llama_wide": ("llama", DENSE | {"head_dim": 32}),
    "qwen3_5_wide": ("qwen3_5", inside(GDN | GDN_ROPE | {"head_dim": 32})),
    "llama4_wide": ("llama4", inside(LLAMA4 | {"head_dim": 32})),
}

# Families that cannot work, with a word of the reason.
REFUSED: dict[str, tuple[str, Config, str]] = {
    "iquestloopcoder": (
        "iquestloopcoder",
        HEADS | {"loop_num": 2, "loop_window_size": WINDOW},
        "without calling the layers",
    ),
}
