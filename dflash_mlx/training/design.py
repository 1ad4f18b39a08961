"""The config of a new draft, in the proportions of the published ones."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.draft.formats import draft_config
from dflash_mlx.draft.formats.fields import default_target_layer_ids
from dflash_mlx.draft.formats.zlab import DFLASH1
from dflash_mlx.errors import DFlashError
from dflash_mlx.target import TargetView
from dflash_mlx.training.mask import mask_token

TAPS = 5


def design_draft(
    view: TargetView,
    target: dict[str, Any],
    tokenizer: TokenizerWrapper,
    *,
    layers: int,
    block_size: int,
    taps: Sequence[int] | None,
    mask: str | None = None,
) -> dict[str, Any]:
    """A published-format config.json for a draft of this target.

    Args:
        view: the target.
        target: its config.json, for the rotary base, the positions and the cap on logits.
        tokenizer: its tokenizer, which may have a mask token.
        layers: of the draft.
        block_size: the anchor and block_size - 1 proposals.
        taps: target layers whose outputs are the context features; None spreads five evenly.
        mask: the token that stands for what is to be proposed; None finds one.

    Raises:
        DFlashError: a tap is no layer of the target, the block is too short, or there is no token
            for a mask.
    """
    if layers < 1:
        raise DFlashError(f"A draft of {layers} layers cannot be; give at least 1.")
    if block_size < 2:
        raise DFlashError(f"A block of {block_size} proposes nothing; give at least 2.")
    chosen = list(taps) if taps is not None else even_taps(view.depth)
    beyond = [tap for tap in chosen if not 0 <= tap < view.depth]
    if beyond or not chosen or len(set(chosen)) < len(chosen):
        raise DFlashError(
            f"Taps {', '.join(map(str, chosen))} cannot be; give different layers of the target, "
            f"from 0 to {view.depth - 1}."
        )
    text = _text_config(target)
    width = view.hidden_size
    head = 128 if width >= 1024 else 64 if width >= 512 else 32
    heads = max(4, width // head)
    config = {
        "architectures": [DFLASH1],
        "model_type": "qwen3",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared_heads(heads),
        "head_dim": head,
        "intermediate_size": 3 * width,
        "vocab_size": view.vocab_size,
        "rms_norm_eps": 1e-6,
        "rope_theta": _rope_theta(text),
        "rope_scaling": None,
        "max_position_embeddings": text.get("max_position_embeddings"),
        "num_target_layers": view.depth,
        "block_size": block_size,
        "attention_bias": False,
        "dflash_config": {
            "target_layer_ids": chosen,
            "mask_token_id": mask_token(view.vocab_size, tokenizer, mask),
        },
    }
    if text.get("final_logit_softcapping") is not None:
        config["final_logit_softcapping"] = text["final_logit_softcapping"]
    draft_config(config)
    return config


def even_taps(depth: int) -> list[int]:
    """Five layers from 1 to depth - 3, or as many as there are; in a shallow target the middle."""
    return default_target_layer_ids(min(TAPS, max(1, depth - 3)), depth)


def shared_heads(heads: int) -> int:
    """Key-value heads: a quarter of sixteen heads and more, as near as divides."""
    if heads < 16:
        return heads
    return next(count for count in range(heads // 4, 0, -1) if heads % count == 0)


def _rope_theta(text: dict[str, Any]) -> float:
    """The base of full attention: `rope_parameters` wins over the flat key, and null is absent."""
    parameters = text.get("rope_parameters") or {}
    kinds = [parameters.get("full_attention"), *parameters.values(), parameters, text]
    bases = (kind.get("rope_theta") for kind in kinds if isinstance(kind, dict))
    return float(next((base for base in bases if base is not None), 10000.0))


def _text_config(target: dict[str, Any]) -> dict[str, Any]:
    """What a config says of the language model; of one with a vision part what lies inside."""
    inner = target.get("text_config") or {}
    return {**target, **{key: value for key, value in inner.items() if value is not None}}
