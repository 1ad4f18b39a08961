"""DeepSpec's packaging of DSpark: a flat copy of the target's config, for Qwen3 and Gemma 4.

With markov_rank 0 it is DeepSpec's DFlash, whose rows are counted as DSpark's all the same.
"""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, AttentionConfig, DraftConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.rope import ropes
from dflash_mlx.draft.schema import Flag, Integer, Integers, Word, read

QWEN3, GEMMA4 = "Qwen3DSparkModel", "Gemma4DSparkModel"

_DSPARK = (
    *fields.VOCABULARY,
    *fields.MARKOV[1:],
    Integer("markov_rank", least=0, most=2**16),
    Integers("target_layer_ids", least=-1),
    Integer("num_target_layers", None, most=2**16),
    Integer("mask_token_id", least=0, most=fields.MOST_TOKENS),
    Flag("sample_from_anchor", True),
    fields.BLOCK,
    fields.CAP,
)
_QWEN3 = (*fields.BACKBONE, *_DSPARK, fields.SWISH)
_GEMMA4 = (
    *fields.BACKBONE,
    *_DSPARK,
    Flag("attention_k_eq_v", False),
    Integer("global_head_dim", None, least=2, most=2048),
    Integer("num_global_key_value_heads", None, most=4096),
    Word("hidden_activation", "gelu_pytorch_tanh", words=("gelu_pytorch_tanh",)),
)


def read_qwen3(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """All layers full and bidirectional; what the config says of windows is the target's.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_QWEN3, config)
    return DraftConfig(
        packaging="DSpark (DeepSpec)",
        architecture=QWEN3,
        **fields.backbone(values),
        **_common(config, values, rows),
        vocabulary=fields.vocabulary(values, shapes),
        attention=fields.attention(values),
    )


def read_gemma4(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """Gemma 4's layers, all of its global kind.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_GEMMA4, config)
    shared = values["attention_k_eq_v"]
    values["head_dim"] = values["global_head_dim"] or values["head_dim"]
    if shared and values["num_global_key_value_heads"] is not None:
        values["num_key_value_heads"] = values["num_global_key_value_heads"]
    return DraftConfig(
        packaging="DSpark (DeepSpec, Gemma 4)",
        architecture=GEMMA4,
        **fields.backbone(values),
        **_common(config, values, rows),
        vocabulary=fields.vocabulary(values, shapes, embedding_scale=values["hidden_size"] ** 0.5),
        attention=AttentionConfig(
            bias=values["attention_bias"], values_from_keys=shared, value_norm=True, scale=1.0
        ),
        sandwich=True,
        activation="gelu",
    )


def _common(config: Mapping[str, Any], values: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    types = (FULL,) * values["num_hidden_layers"]
    anchor = fields.anchor_rows(rows, values["sample_from_anchor"])
    return {
        **fields.block(values, anchor),
        "layers": fields.layers(
            types,
            ropes(config, values["max_position_embeddings"]),
            window=None,
            causal={FULL: False},
        ),
        **fields.markov(values),
    }


DEEPSPEC_QWEN3 = Packaging(
    "DSpark (DeepSpec)",
    lambda config: QWEN3 in fields.architectures(config) and not config.get("dflash_config"),
    read_qwen3,
)
DEEPSPEC_GEMMA4 = Packaging(
    "DSpark (DeepSpec, Gemma 4)",
    lambda config: GEMMA4 in fields.architectures(config),
    read_gemma4,
)
