"""Tiny draft checkpoints in the published formats, with random weights.

One function per published family gives its config.json, scaled down: the keys, the number of
layers and taps, layer types, block size and the ratio of heads are those of the family; widths,
vocabulary and depth of the target are the caller's.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

Config = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


def _config(
    width: int,
    target_layers: int,
    vocab_size: int,
    *,
    layers: int,
    taps: int,
    block_size: int,
    layer_types: list[str] | None = None,
    sliding_window: int | None = None,
    head_dim: int = 32,
    heads_per_kv_head: int = 4,
    **more: Any,
) -> Config:
    """What all DFlash 1 configs share; None among `more` leaves a key out."""
    step = (target_layers - 4) / (taps - 1)
    config: Config = {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": block_size,
        "dflash_config": {
            "mask_token_id": vocab_size - 2,
            "target_layer_ids": [round(1 + i * step) for i in range(taps)],
        },
        "dtype": "bfloat16",
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 3 * width,
        "layer_types": layer_types or [FULL] * layers,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": 2 * width // head_dim,
        "num_hidden_layers": layers,
        "num_key_value_heads": max(1, 2 * width // head_dim // heads_per_kv_head),
        "num_target_layers": target_layers,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": sliding_window,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": sliding_window is not None,
        "vocab_size": vocab_size,
    }
    config.update(more)
    return config


def qwen3(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """Qwen3 4B, 8B: 5 full layers, block 16."""
    return _config(width, target_layers, vocab_size, layers=5, taps=5, block_size=16)


def qwen3_5(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """Qwen3.5 and 3.6 as retrained: 6 layers, 8 taps, sliding; theta in rope_parameters."""
    config = _config(
        width,
        target_layers,
        vocab_size,
        layers=6,
        taps=8,
        block_size=16,
        layer_types=[SLIDING] * 5 + [FULL],
        sliding_window=64,
        rope_parameters={"rope_theta": 10000000, "rope_type": "default"},
    )
    del config["rope_theta"], config["rope_scaling"]
    return config


def qwen3_coder_next(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """Qwen3-Coder-Next: 8 full layers on 5 taps, many heads to few; block size in dflash_config."""
    config = _config(
        width,
        target_layers,
        vocab_size,
        layers=8,
        taps=5,
        block_size=16,
        heads_per_kv_head=8,
        rope_theta=10000000,
    )
    config["dflash_config"]["block_size"] = config.pop("block_size")
    return config


def gemma4(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """Gemma 4: 4 sliding layers and a full one, 6 taps, mask 4, logits capped at 30."""
    config = _config(
        width,
        target_layers,
        vocab_size,
        layers=5,
        taps=6,
        block_size=16,
        layer_types=[SLIDING] * 4 + [FULL],
        sliding_window=32,
        final_logit_softcapping=30.0,
    )
    config["dflash_config"]["mask_token_id"] = 4
    return config


def gpt_oss(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """gpt-oss: 8 full layers on 5 taps, heads of 64, YaRN, block 8."""
    return _config(
        width,
        target_layers,
        vocab_size,
        layers=8,
        taps=5,
        block_size=8,
        head_dim=64,
        heads_per_kv_head=8,
        max_position_embeddings=131072,
        rope_theta=150000,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
        },
    )


def kimi(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """Kimi K2.5: 6 full layers on 6 taps, block 8."""
    return _config(
        width, target_layers, vocab_size, layers=6, taps=6, block_size=8, rope_theta=50000
    )


def minimax(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """MiniMax M2.5: 4 sliding layers and a full one, 6 taps."""
    return _config(
        width,
        target_layers,
        vocab_size,
        layers=5,
        taps=6,
        block_size=16,
        layer_types=[SLIDING] * 4 + [FULL],
        sliding_window=64,
        rope_theta=5000000,
    )


def llama3_1(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """Llama 3.1 8B: 5 full layers, block 10."""
    return _config(
        width,
        target_layers,
        vocab_size,
        layers=5,
        taps=5,
        block_size=10,
        rms_norm_eps=1e-05,
        rope_theta=500000,
    )


def _dflash2(config: Config, **more: Any) -> Config:
    """A config turned into DFlash 2's: all layers slide, block size and convolutions inside."""
    layers = config["num_hidden_layers"]
    config["architectures"] = ["DFlash2DraftModel"]
    config["auto_map"] = {"AutoModel": "dflash.DFlash2DraftModel"}
    config["layer_types"] = [SLIDING] * layers
    config["dflash_config"].update(
        block_size=config.pop("block_size"),
        conv_kernel_size=2,
        conv_group_size=16,
        selector_rank=32,
        selector_top_k=8,
        **more,
    )
    return config


def qwen3_8(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """Qwen3.8-27B: DFlash 2, 5 layers on 5 taps, block 8."""
    return _dflash2(
        _config(
            width,
            target_layers,
            vocab_size,
            layers=5,
            taps=5,
            block_size=8,
            sliding_window=32,
            is_causal=False,
            rope_theta=10000000,
        )
    )


def glm5_3_flash(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """GLM-5.3-Flash: DFlash 2, 5 taps, block 8, theta 1e4."""
    return _dflash2(
        _config(
            width,
            target_layers,
            vocab_size,
            layers=5,
            taps=5,
            block_size=8,
            sliding_window=32,
            is_causal=False,
            rope_theta=10000,
            rms_norm_eps=1e-05,
        )
    )


def muse_glimmer(width: int = 128, target_layers: int = 12, vocab_size: int = 512) -> Config:
    """Muse-Glimmer: DFlash 2, block 16, logits scaled by 0.196 and capped at 20."""
    return _dflash2(
        _config(
            width,
            target_layers,
            vocab_size,
            layers=5,
            taps=5,
            block_size=16,
            sliding_window=32,
            is_causal=False,
        ),
        final_logit_softcapping=20.0,
        output_multiplier=0.196,
    )


DFLASH_1: dict[str, Callable[..., Config]] = {
    f.__name__: f
    for f in (qwen3, qwen3_5, qwen3_coder_next, gemma4, gpt_oss, kimi, minimax, llama3_1)
}
DFLASH_2: dict[str, Callable[..., Config]] = {
    f.__name__: f for f in (qwen3_8, glm5_3_flash, muse_glimmer)
}
FAMILIES = DFLASH_1 | DFLASH_2


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a config's checkpoint holds, as published."""
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    head_dim, dflash = config["head_dim"], config["dflash_config"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    found: dict[str, tuple[int, ...]] = {
        "fc.weight": (dim, len(dflash["target_layer_ids"]) * dim),
        "hidden_norm.weight": (dim,),
        "norm.weight": (dim,),
    }
    for i in range(config["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (dim,),
            "post_attention_layernorm.weight": (dim,),
            "self_attn.q_proj.weight": (queries, dim),
            "self_attn.k_proj.weight": (keys, dim),
            "self_attn.v_proj.weight": (keys, dim),
            "self_attn.o_proj.weight": (dim, queries),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.k_norm.weight": (head_dim,),
            "mlp.gate_proj.weight": (hidden, dim),
            "mlp.up_proj.weight": (hidden, dim),
            "mlp.down_proj.weight": (dim, hidden),
        }
        if config.get("attention_bias"):
            for name, rows in (("q", queries), ("k", keys), ("v", keys), ("o", dim)):
                layer[f"self_attn.{name}_proj.bias"] = (rows,)
        if "conv_kernel_size" in dflash:
            taps = dflash["conv_kernel_size"]
            for conv in ("attention_conv", "mlp_conv"):
                layer[f"{conv}.base_kernel"] = (2, taps, dim)
                rows = 2 * taps * dim // dflash["conv_group_size"]
                layer[f"{conv}.kernel_projection.weight"] = (rows, dim)
        found.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    if "selector_rank" in dflash:
        rank, vocab = dflash["selector_rank"], config["vocab_size"]
        found["candidate_selector.predecessor_codebook"] = (vocab, rank)
        found["candidate_selector.successor_codebook"] = (vocab, rank)
        found["candidate_selector.hidden_projection.weight"] = (rank, dim)
    return found


def tensors(config: Config, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    """Random weights of a config's checkpoint: norms near one, rows of about unit length."""
    key = mx.random.key(seed)
    found = {}
    for name, shape in shapes(config).items():
        key, own = mx.random.split(key)
        array = mx.random.normal(shape, key=own)
        array = 1 + 0.1 * array if len(shape) == 1 else array * shape[-1] ** -0.5
        found[name] = array.astype(dtype)
    return found


def write(
    directory: Path,
    config: Config,
    seed: int = 0,
    dtype: mx.Dtype = mx.bfloat16,
    shards: int = 1,
    prefix: str = "",
) -> Path:
    """Write a checkpoint of a config into a new directory, which is returned.

    Args:
        directory: is made.
        config: of a family above, or changed from one.
        seed: of the weights.
        dtype: of the weights.
        shards: files; with an index when there are several.
        prefix: in front of each tensor's name; "model." occurs.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    named = [(prefix + name, array) for name, array in tensors(config, seed, dtype).items()]
    weight_map = {}
    for i in range(shards):
        part = dict(named[i::shards])
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        )
        mx.save_safetensors(str(directory / file), part, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
