"""The fields that packagings share, and what is made of them."""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import (
    FULL,
    SLIDING,
    AttentionConfig,
    ConvolutionConfig,
    LayerConfig,
    MarkovConfig,
    Rope,
    SelectorConfig,
    VocabularyConfig,
)
from dflash_mlx.draft.formats.packaging import Rows, Shapes
from dflash_mlx.draft.schema import (
    Field,
    Flag,
    Integer,
    Integers,
    Number,
    Object,
    Word,
    Words,
    read,
)
from dflash_mlx.errors import CheckpointError

MOST_ROWS = 1024  # of a block
MOST_TOKENS = 2**24  # of a vocabulary

BACKBONE: tuple[Field, ...] = (
    Integer("hidden_size", most=2**17),
    Integer("num_hidden_layers", most=512),
    Integer("num_attention_heads", most=4096),
    Integer("num_key_value_heads", None, most=4096),
    Integer("head_dim", None, least=2, most=2048),
    Integer("intermediate_size", most=2**20),
    Number("rms_norm_eps"),
    Integer("max_position_embeddings", None, most=2**40),
    Flag("attention_bias", False),
    Words("layer_types", None),
    Integer("sliding_window", None, most=2**31),
)
VOCABULARY = (Integer("vocab_size", most=MOST_TOKENS), Flag("tie_word_embeddings", False))
MASK = Integer("mask_token_id", least=0, most=MOST_TOKENS, inside="dflash_config")
BLOCK = Integer("block_size", most=MOST_ROWS)
TARGET = (
    Integers("target_layer_ids", None, least=-1),
    Integer("num_target_layers", None, most=2**16),
)
# As EAGLE counts taps: the first is the embedding's output.
EAGLE_TAPS = Integers("eagle_aux_hidden_state_layer_ids", None)
CAP = Number("final_logit_softcapping", None)
SWISH = Word("hidden_act", "silu", words=("silu", "swish"))
MARKOV: tuple[Field, ...] = (
    Integer("markov_rank", 0, least=0, most=2**16),
    Word("markov_head_type", "vanilla", words=("vanilla", "gated", "rnn")),
    Flag("enable_confidence_head", False),
    Flag("confidence_head_with_markov", False),
)
SECOND: tuple[Field, ...] = (
    Integer("conv_kernel_size", most=64),
    Integer("conv_group_size", most=2**17),
    Integer("selector_rank", most=2**16),
    Integer("selector_top_k", most=2**16),
)


def backbone(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a DraftConfig that says how large a layer is, of values of BACKBONE.

    Raises:
        CheckpointError: the numbers contradict each other.
    """
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"The draft's config.json has {heads} attention heads, which its {kv_heads} key-value "
            "heads do not divide."
        )
    head_dim = values["head_dim"] or dim // heads
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(
            f"The draft's config.json gives heads of {head_dim} dimensions; an even number is "
            "needed."
        )
    return {
        "hidden_size": dim,
        "target_hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": values["intermediate_size"],
        "rms_norm_eps": values["rms_norm_eps"],
    }


def kinds(values: Mapping[str, Any], default: str) -> tuple[tuple[str, ...], int | None]:
    """Attention kind of each layer and the window, of values of BACKBONE.

    Raises:
        CheckpointError: there are not as many as layers, one is unknown, or the window is missing.
    """
    layers, window = values["num_hidden_layers"], values["sliding_window"]
    types = values["layer_types"] or (default,) * layers
    if len(types) != layers:
        raise CheckpointError(
            f"The draft's config.json has {len(types)} layer_types for {layers} layers."
        )
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise CheckpointError(
            f"The draft's config.json has layer_types {', '.join(unknown)[:60]}; supported: "
            f"{FULL}, {SLIDING}."
        )
    if SLIDING in types and window is None:
        raise CheckpointError(
            "The draft's config.json has sliding layers and sliding_window None; a positive whole "
            "number is needed."
        )
    return types, window if SLIDING in types else None


def layers(
    types: tuple[str, ...],
    ropes: Mapping[str, Rope],
    window: int | None,
    causal: Mapping[str, bool],
    anchored: bool = False,
    sinks: bool = False,
) -> tuple[LayerConfig, ...]:
    """One LayerConfig for each attention kind of `types`."""
    return tuple(
        LayerConfig(
            rope=ropes[kind],
            window=window if kind == SLIDING else None,
            anchored=anchored and kind == SLIDING,
            causal=causal[kind],
            sinks=sinks,
        )
        for kind in types
    )


def sink_layers(shapes: Shapes, said: bool) -> bool:
    """Whether layers have sinks: the config says so, or the files hold them."""
    return said or any(name.endswith("self_attn.attention_sink_bias") for name in shapes)


def default_target_layer_ids(draft_layers: int, target_layers: int) -> list[int]:
    """The published default taps: one in the middle, or evenly spread from 1 to L - 3."""
    if draft_layers == 1:
        return [target_layers // 2]
    first, last = 1, target_layers - 3
    step = (last - first) / (draft_layers - 1)
    return [round(first + i * step) for i in range(draft_layers)]


def target_layer_ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    """The taps, of values of TARGET and EAGLE_TAPS: as they stand there, or z-lab's default.

    Raises:
        CheckpointError: none of them is known.
    """
    ids, depth = values["target_layer_ids"], values["num_target_layers"]
    if ids is not None:
        return ids
    if shifted := values.get("eagle_aux_hidden_state_layer_ids"):
        return tuple(i - 1 for i in shifted)
    if depth is None or depth < 4:
        raise CheckpointError(
            "The draft's config.json has neither dflash_config.target_layer_ids nor "
            "num_target_layers, so its taps are unknown."
        )
    return tuple(default_target_layer_ids(values["num_hidden_layers"], depth))


def markov(values: Mapping[str, Any]) -> dict[str, Any]:
    """The chain and the confidence head, of values of MARKOV.

    Raises:
        CheckpointError: the confidence head wants the embedding of a chain that is not there.
    """
    rank = values["markov_rank"]
    confidence = values["enable_confidence_head"]
    with_markov = confidence and values["confidence_head_with_markov"]
    if with_markov and not rank:
        raise CheckpointError(
            "The draft's config.json has confidence_head_with_markov true and markov_rank 0; the "
            "confidence head needs a Markov chain then."
        )
    return {
        "head": MarkovConfig(rank, values["markov_head_type"]) if rank else None,
        "confidence": confidence,
        "confidence_with_markov": with_markov,
    }


def second(values: Mapping[str, Any], hidden_size: int, vocab_size: int) -> dict[str, Any]:
    """What makes a draft a DFlash 2, of values of SECOND.

    Raises:
        CheckpointError: the numbers contradict each other.
    """
    group, top_k = values["conv_group_size"], values["selector_top_k"]
    if hidden_size % group:
        raise CheckpointError(
            f"The draft's config.json has conv_group_size {group}, which does not divide its "
            f"hidden_size {hidden_size}."
        )
    if top_k > vocab_size:
        raise CheckpointError(
            f"The draft's config.json has selector_top_k {top_k} and only {vocab_size} tokens."
        )
    return {
        "convolution": ConvolutionConfig(values["conv_kernel_size"], group),
        "head": SelectorConfig(values["selector_rank"], top_k),
    }


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a config.json names.

    Raises:
        CheckpointError: `architectures` is no list of names.
    """
    return read((Words("architectures", ()),), config)["architectures"]


def architecture(config: Mapping[str, Any]) -> str:
    """The first of them; "" where there is none."""
    return next(iter(architectures(config)), "")


def inner(config: Mapping[str, Any], key: str = "dflash_config") -> dict[str, Any]:
    """An object inside a config.json; empty where it is absent.

    Raises:
        CheckpointError: it is something else.
    """
    return read((Object(key, None),), config)[key] or {}


def attention(values: Mapping[str, Any]) -> AttentionConfig:
    """Qwen3's attention, of values of BACKBONE."""
    return AttentionConfig(bias=values["attention_bias"])


def vocabulary(
    values: Mapping[str, Any],
    shapes: Shapes,
    draft_size: int | None = None,
    embedding_scale: float = 1.0,
) -> VocabularyConfig:
    """Whose embedding and head are used: the draft's own where the files hold them.

    Args:
        values: of VOCABULARY.
        shapes: of the tensors in the files.
        draft_size: of a reduced vocabulary.
        embedding_scale: factor of an embedding of its own.
    """
    own_embedding, own_head = "embed_tokens.weight" in shapes, "lm_head.weight" in shapes
    tied = bool(values.get("tie_word_embeddings")) and own_embedding and not own_head
    size = values.get("vocab_size")
    if size is None and (own_embedding or own_head):  # not every packaging says it
        size = shapes["embed_tokens.weight" if own_embedding else "lm_head.weight"][0]
    return VocabularyConfig(
        size=size,
        draft_size=draft_size,
        own_embedding=own_embedding,
        own_head=own_head or tied,
        tied=tied,
        embedding_scale=embedding_scale,
        mask_embedding="mask_embedding" in shapes,
    )


def anchor_rows(rows: Rows, said: bool) -> bool:
    """Whether the anchor's row proposes: as the user decided, or else as the files say."""
    return said if rows.anchor is None else rows.anchor


def block(values: Mapping[str, Any], anchor: bool) -> dict[str, Any]:
    """The part of a DraftConfig that says what a block is, and which target it is for.

    Args:
        values: of BLOCK, MASK, TARGET and CAP.
        anchor: whether the anchor's row proposes.

    Raises:
        CheckpointError: the block makes no proposal, or the taps are unknown.
    """
    size, least = values["block_size"], 1 if anchor else 2
    if size < least:
        raise CheckpointError(
            f"The draft's config.json has block_size {size}; at least {least} is needed."
        )
    return {
        "block_size": size,
        "anchor_proposes": anchor,
        "mask_token_id": values["mask_token_id"],
        "target_layer_ids": target_layer_ids(values),
        "num_target_layers": values["num_target_layers"],
        "final_logit_softcapping": values["final_logit_softcapping"],
    }
