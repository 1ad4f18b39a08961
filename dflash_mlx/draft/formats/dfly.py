"""DFly, in the names that AngelSlim trains with.

Each layer adds a mixture of the taps of its own; hidden states are corrected token by token.
"""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, SLIDING, ContextConfig, CorrectionConfig, DraftConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.rope import ropes
from dflash_mlx.draft.schema import Flag, Integer, Integers, read

DFLY = "DFlyDraftModel"

_FIELDS = (
    *fields.BACKBONE,
    *fields.VOCABULARY,
    Integers("target_layer_ids", least=-1),
    Integer("target_num_hidden_layers", None, most=2**16),
    Integer("target_hidden_size", None, most=2**17),
    fields.BLOCK,
    fields.MASK,
    fields.CAP,
    fields.SWISH,
    Flag("sample_from_anchor", False),
    Flag("enable_hidden_correction", True),
    Integer("hidden_correction_intermediate_size", None, most=2**20),
)


def read_dfly(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """A flat config, in which num_target_layers counts the taps.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_FIELDS, config, "dflash_config")
    types, window = fields.kinds(values, FULL)
    anchor = fields.anchor_rows(rows, values["sample_from_anchor"])
    values["num_target_layers"] = values["target_num_hidden_layers"]
    width = values["hidden_correction_intermediate_size"] or values["hidden_size"]
    return DraftConfig(
        packaging="DFly",
        architecture=DFLY,
        **fields.backbone(values),
        **fields.block(values, anchor),
        layers=fields.layers(
            types,
            ropes(config, values["max_position_embeddings"]),
            window,
            causal={FULL: False, SLIDING: True},
        ),
        vocabulary=fields.vocabulary(values, shapes),
        attention=fields.attention(values),
        context=ContextConfig(fusion=True),
        head=CorrectionConfig(width) if values["enable_hidden_correction"] else None,
    )


DFLY_ANGELSLIM = Packaging(
    "DFly",
    lambda config: DFLY in fields.architectures(config),
    read_dfly,
    prefixes=("module.", "draft_model.", "model."),
    renamed=(
        ("context_proj", "fc"),
        ("context_norm", "hidden_norm"),
        ("final_norm", "norm"),
    ),
    left_aside=("embed_tokens.", "lm_head."),
)
