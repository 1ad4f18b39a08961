"""NVIDIA's packaging of DSpark: DeepSpec's class name, with `dflash_config` and keys of its own.

A causal block, sliding layers, attention sinks, an embedding of its own and the target's head.
"""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, SLIDING, DraftConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.deepspec import QWEN3
from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.rope import ropes
from dflash_mlx.draft.schema import Flag, Integer, read

_FIELDS = (
    *fields.BACKBONE,
    *fields.VOCABULARY,
    *fields.MARKOV,
    *fields.TARGET,
    fields.MASK,
    fields.BLOCK,
    fields.CAP,
    fields.SWISH,
    Integer("dspark_markov_rank", None, least=0, most=2**16),
    Flag("causal", None),
    Flag("dflash_query_causal", None),
    Flag("use_swa", False),
    Integer("swa_window_size", None, most=2**31),
    Flag("attention_sink_bias", False),
    Flag("sample_from_anchor", None),
    Flag("dspark_bonus_anchor", None),
    fields.EAGLE_TAPS,
)


def read_nvidia(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """The anchor's row proposes only where sample_from_anchor says so.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_FIELDS, config, "dflash_config")
    types, window = fields.kinds(values, FULL)
    if values["use_swa"] and values["swa_window_size"] is not None:
        types, window = (SLIDING,) * len(types), values["swa_window_size"]
    causal = values["causal"]
    if causal is None:
        causal = values["dflash_query_causal"] or False
    said = values["sample_from_anchor"]
    if said is None:
        said = not values["dspark_bonus_anchor"]
    anchor = fields.anchor_rows(rows, said)
    if values["dspark_markov_rank"] is not None:
        values["markov_rank"] = values["dspark_markov_rank"]
    return DraftConfig(
        packaging="DSpark (NVIDIA)",
        architecture=QWEN3,
        **fields.backbone(values),
        **fields.block(values, anchor),
        layers=fields.layers(
            types,
            ropes(config, values["max_position_embeddings"]),
            window,
            causal={FULL: causal, SLIDING: causal},
            sinks=fields.sink_layers(shapes, values["attention_sink_bias"]),
        ),
        vocabulary=fields.vocabulary(values, shapes),
        attention=fields.attention(values),
        **fields.markov(values),
    )


NVIDIA_DSPARK = Packaging(
    "DSpark (NVIDIA)",
    lambda config: QWEN3 in fields.architectures(config) and bool(config.get("dflash_config")),
    read_nvidia,
)
