"""The Muse Glimmer assistant: DFlash 1 in other names, with a window of its own counting."""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, SLIDING, DraftConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.rope import ropes
from dflash_mlx.draft.schema import Integer, Integers, read

MUSE = "MuseGlimmerAssistantModel"

_FIELDS = (
    *fields.BACKBONE,
    Integer("vocab_size", None, most=fields.MOST_TOKENS),
    Integers("target_layer_ids", least=-1),
    fields.TARGET[1],
    fields.BLOCK,
    Integer("mask_token_id", least=0, most=fields.MOST_TOKENS),
    fields.CAP,
    fields.SWISH,
)


def read_muse(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """A flat config; the block is bidirectional, and a distance of sliding_window is still seen.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_FIELDS, config)
    types, window = fields.kinds(values, SLIDING)
    anchor = fields.anchor_rows(rows, False)
    return DraftConfig(
        packaging="Muse assistant",
        architecture=MUSE,
        **fields.backbone(values),
        **fields.block(values, anchor),
        layers=fields.layers(
            types,
            ropes(config, values["max_position_embeddings"]),
            None if window is None else window + 1,
            causal={FULL: False, SLIDING: False},
        ),
        vocabulary=fields.vocabulary(values, shapes),
        attention=fields.attention(values),
    )


MUSE_ASSISTANT = Packaging(
    "Muse assistant",
    lambda config: MUSE in fields.architectures(config),
    read_muse,
    renamed=(("encoder.fc", "fc"), ("encoder.output_norm_enc", "hidden_norm")),
)
