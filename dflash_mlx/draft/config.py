"""A draft's config.json, read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dflash_mlx.errors import CheckpointError

DFLASH1 = "DFlashDraftModel"
DFLASH2 = "DFlash2DraftModel"
FULL = "full_attention"
SLIDING = "sliding_attention"

_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class DFlash2Config:
    """What only a DFlash 2 draft has: block convolutions and a candidate selector."""

    conv_kernel_size: int
    conv_group_size: int
    selector_rank: int
    selector_top_k: int
    input_embedding_scale: float
    output_multiplier: float

    @classmethod
    def from_dict(cls, dflash: Mapping[str, Any], hidden_size: int, vocab_size: int) -> Self:
        """Read `dflash_config`; the published values are the defaults of the last two only.

        Raises:
            CheckpointError: a value is missing or cannot be.
        """
        group_size = _integer(dflash, "conv_group_size")
        if hidden_size % group_size:
            raise CheckpointError(
                f"The draft's config.json has conv_group_size {group_size}, which does not divide "
                f"its hidden_size {hidden_size}."
            )
        top_k = _integer(dflash, "selector_top_k")
        if top_k > vocab_size:
            raise CheckpointError(
                f"The draft's config.json has selector_top_k {top_k} and only {vocab_size} tokens."
            )
        return cls(
            conv_kernel_size=_integer(dflash, "conv_kernel_size"),
            conv_group_size=group_size,
            selector_rank=_integer(dflash, "selector_rank"),
            selector_top_k=top_k,
            input_embedding_scale=float(dflash.get("input_embedding_scale") or 1.0),
            output_multiplier=float(dflash.get("output_multiplier") or 1.0),
        )


@dataclass(frozen=True)
class DraftConfig:
    """What the published `config.json` of a DFlash draft says, defaults filled in.

    `target_layer_ids` are 0-based indices of the target blocks whose outputs are tapped.
    `num_target_layers` and `max_position_embeddings` are None when the file does not say.
    """

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int | None
    num_target_layers: int | None
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    layer_types: tuple[str, ...]
    sliding_window: int | None
    is_causal: bool | None
    attention_bias: bool
    final_logit_softcapping: float | None
    quantization: dict[str, Any] | None
    dflash2: DFlash2Config | None = None

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in positions, the query's own included; None if full."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def causal_block(self, layer: int) -> bool:
        """Whether a layer's attention inside the block is causal.

        `is_causal` decides where the config has it; where it has not, sliding layers are causal
        and full layers bidirectional, as in the authors' own runtime.
        """
        if self.is_causal is not None:
            return self.is_causal
        return self.layer_types[layer] == SLIDING

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DraftConfig":
        """Read a published config; unknown keys are ignored.

        Raises:
            CheckpointError: a key is missing, contradicts another, or names an architecture that
                is not implemented.
        """
        architecture = _architecture(config)
        dflash = config.get("dflash_config") or {}
        missing = [key for key in _REQUIRED if config.get(key) is None]
        missing += [
            f"dflash_config.{key}"
            for key in ("mask_token_id",)
            if dflash.get(key, config.get(key)) is None
        ]
        block_size = _one_value(config, dflash, "block_size")
        if block_size is None:
            missing.append("block_size")
        if missing:
            raise CheckpointError(f"The draft's config.json lacks {', '.join(missing)}.")

        layers = _integer(config, "num_hidden_layers")
        heads = _integer(config, "num_attention_heads")
        kv_heads = _integer(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"The draft's config.json has {heads} attention heads, which its {kv_heads} "
                "key-value heads do not divide."
            )
        hidden_size = _integer(config, "hidden_size")
        rope_theta, rope_scaling = _rope(config)
        num_target_layers = config.get("num_target_layers")
        ids = dflash.get("target_layer_ids", config.get("target_layer_ids"))
        if ids is None:
            if num_target_layers is None:
                raise CheckpointError(
                    "The draft's config.json has neither dflash_config.target_layer_ids nor "
                    "num_target_layers, so its taps are unknown."
                )
            ids = default_target_layer_ids(layers, int(num_target_layers))
        if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise CheckpointError(
                f"The draft's config.json has target_layer_ids {ids!r}; a non-empty list of layer "
                "indices from 0 is needed."
            )
        second = architecture == DFLASH2
        layer_types, window = _layer_types(config, layers, SLIDING if second else FULL)
        block_size = int(block_size)
        if block_size < 2:
            raise CheckpointError(
                f"The draft's config.json has block_size {block_size}; at least 2 is needed."
            )
        cap = _one_value(config, dflash, "final_logit_softcapping")
        max_positions = config.get("max_position_embeddings")
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_integer(config, "head_dim", hidden_size // heads),
            intermediate_size=_integer(config, "intermediate_size"),
            vocab_size=_integer(config, "vocab_size"),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=None if max_positions is None else int(max_positions),
            num_target_layers=None if num_target_layers is None else int(num_target_layers),
            block_size=block_size,
            target_layer_ids=tuple(ids),
            mask_token_id=int(_one_value(config, dflash, "mask_token_id")),
            layer_types=layer_types,
            sliding_window=window,
            is_causal=_one_value(config, dflash, "is_causal"),
            attention_bias=bool(config.get("attention_bias", False)),
            final_logit_softcapping=None if cap is None else float(cap),
            quantization=config.get("quantization") or config.get("quantization_config"),
            dflash2=(
                DFlash2Config.from_dict(dflash, hidden_size, int(config["vocab_size"]))
                if second
                else None
            ),
        )


def default_target_layer_ids(draft_layers: int, target_layers: int) -> list[int]:
    """The published default taps: one in the middle, or evenly spread from 1 to L - 3."""
    if draft_layers == 1:
        return [target_layers // 2]
    first, last = 1, target_layers - 3
    step = (last - first) / (draft_layers - 1)
    return [round(first + i * step) for i in range(draft_layers)]


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    known = (DFLASH1, DFLASH2)
    for name in names:
        if name in known:
            return name
    if not names and "dflash_config" in config:
        return DFLASH1
    said = ", ".join(names) if names else f"model_type {config.get('model_type')!r}"
    raise CheckpointError(
        f"This is not a DFlash draft that is supported: its config.json says {said}; supported: "
        f"{', '.join(known)}."
    )


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"The draft's config.json has {key} {value!r}; a positive whole number is needed."
        )
    return value


def _one_value(config: Mapping[str, Any], dflash: Mapping[str, Any], key: str) -> Any:
    """A key that may stand at the top level, inside dflash_config, or equal in both."""
    outer, inner = config.get(key), dflash.get(key)
    if outer is not None and inner is not None and outer != inner:
        raise CheckpointError(
            f"The draft's config.json contradicts itself: {key} is {outer} at the top and {inner} "
            "inside dflash_config."
        )
    return inner if inner is not None else outer


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    parameters = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", parameters.get("rope_theta"))
    if theta is None:
        raise CheckpointError("The draft's config.json lacks rope_theta.")
    scaling = config.get("rope_scaling")
    if scaling is None:
        rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if rest.get("rope_type", "default") != "default":
            scaling = rest
    return float(theta), scaling


def _layer_types(
    config: Mapping[str, Any], layers: int, default: str
) -> tuple[tuple[str, ...], int | None]:
    types = tuple(config.get("layer_types") or (default,) * layers)
    if len(types) != layers:
        raise CheckpointError(
            f"The draft's config.json has {len(types)} layer_types for {layers} layers."
        )
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise CheckpointError(
            f"The draft's config.json has layer_types {', '.join(unknown)}; supported: {FULL}, "
            f"{SLIDING}."
        )
    window = config.get("sliding_window")
    if SLIDING not in types:
        return types, None
    if not isinstance(window, int) or window < 1:
        raise CheckpointError(
            f"The draft's config.json has sliding layers and sliding_window {window!r}; a positive "
            "whole number is needed."
        )
    return types, window
