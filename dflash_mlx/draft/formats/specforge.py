"""SpecForge's packaging of DSpark, and LiquidAI's, which differs in how it rotates.

A Qwen3 config with `dflash_config`; no embedding and no head.
"""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, SLIDING, DraftConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.rope import ropes
from dflash_mlx.draft.schema import Flag, Integers, read

SPECFORGE, LFM2 = "DSparkDraftModel", "Lfm2DSparkDraftModel"

_FIELDS = (
    *fields.BACKBONE,
    *fields.VOCABULARY,
    *fields.MARKOV,
    Integers("target_layer_ids", least=-1, inside="dflash_config"),
    fields.TARGET[1],
    fields.MASK,
    fields.BLOCK,
    fields.CAP,
    fields.SWISH,
    Flag("sample_from_anchor", True),
)
_LFM2 = (*_FIELDS, Flag("rope_is_neox_style", True))


def read_specforge(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """Full layers are bidirectional, sliding ones causal; YaRN is the draft's own.

    Its own decoding skips row 0 although it was trained to propose, and is not followed.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_FIELDS, config, "dflash_config")
    return _draft("DSpark (SpecForge)", SPECFORGE, config, values, shapes, rows, False)


def read_lfm2(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """SpecForge's keys, with neighbours rotated where rope_is_neox_style is false.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_LFM2, config, "dflash_config")
    # Here the heads are told by what the files hold as well: one repository says nothing.
    confidence = "confidence_head.proj.weight" in shapes
    values["enable_confidence_head"] = values["enable_confidence_head"] or confidence
    if confidence and values["markov_rank"]:
        width = shapes["confidence_head.proj.weight"][-1]
        values["confidence_head_with_markov"] = width != values["hidden_size"]
    interleaved = not values["rope_is_neox_style"]
    return _draft("DSpark (LiquidAI)", LFM2, config, values, shapes, rows, interleaved)


def _draft(
    name: str,
    architecture: str,
    config: Mapping[str, Any],
    values: Mapping[str, Any],
    shapes: Shapes,
    rows: Rows,
    interleaved: bool,
) -> DraftConfig:
    types, window = fields.kinds(values, FULL)
    anchor = fields.anchor_rows(rows, values["sample_from_anchor"])
    return DraftConfig(
        packaging=name,
        architecture=architecture,
        **fields.backbone(values),
        **fields.block(values, anchor),
        layers=fields.layers(
            types,
            ropes(config, values["max_position_embeddings"], interleaved),
            window,
            causal={FULL: False, SLIDING: True},
        ),
        vocabulary=fields.vocabulary(values, shapes),
        attention=fields.attention(values),
        **fields.markov(values),
    )


SPECFORGE_DSPARK = Packaging(
    "DSpark (SpecForge)",
    lambda config: SPECFORGE in fields.architectures(config),
    read_specforge,
    prefixes=("logit_head.",),  # of old exports
)
LIQUID_DSPARK = Packaging(
    "DSpark (LiquidAI)",
    lambda config: LFM2 in fields.architectures(config),
    read_lfm2,
    prefixes=("logit_head.",),
)
