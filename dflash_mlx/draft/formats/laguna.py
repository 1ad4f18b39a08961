"""Laguna's drafts: each tap normalised, gated heads, one projection for queries, keys, values.

Context rows pass each layer's input norm, as in vLLM and SGLang.
"""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, SLIDING, AttentionConfig, ContextConfig, DraftConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.rope import ropes
from dflash_mlx.draft.schema import Flag, read, shown
from dflash_mlx.errors import CheckpointError

LAGUNA = "DFlashLagunaForCausalLM"

_FIELDS = (
    *fields.BACKBONE,
    *fields.VOCABULARY,
    *fields.TARGET,
    fields.BLOCK,
    fields.MASK,
    fields.CAP,
    fields.SWISH,
    Flag("causal", True),
    Flag("qkv_bias", False),
    Flag("sample_from_anchor", False),
    fields.EAGLE_TAPS,
)
# What the config calls the ways to gate, and the library.
_GATING = {
    "per-head": "per-head",
    "per_head": "per-head",
    True: "per-head",
    "per-element": "per-element",
    "per_element": "per-element",
    "off": None,
    "none": None,
    False: None,
}


def read_laguna(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """A Laguna config with `dflash_config`.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_FIELDS, config, "dflash_config")
    types, window = fields.kinds(values, SLIDING)
    anchor = fields.anchor_rows(rows, values["sample_from_anchor"])
    causal = values["causal"]
    return DraftConfig(
        packaging="Laguna",
        architecture=LAGUNA,
        **fields.backbone(values),
        **fields.block(values, anchor),
        layers=fields.layers(
            types,
            ropes(config, values["max_position_embeddings"]),
            window,
            causal={FULL: causal, SLIDING: causal},
            sinks=fields.sink_layers(shapes, False),
        ),
        vocabulary=fields.vocabulary(values, shapes),
        attention=AttentionConfig(bias=values["qkv_bias"], fused=True, gating=_gating(config)),
        context=ContextConfig(tap_norms=True, layer_norms=True),
    )


def _gating(config: Mapping[str, Any]) -> str | None:
    said = config.get("gating")
    if said is None:
        return "per-head"
    if not isinstance(said, (str, bool)) or said not in _GATING:
        raise CheckpointError(
            f"The draft's config.json has gating {shown(said)}; per-head, per-element or off is "
            "needed."
        )
    return _GATING[said]


LAGUNA_DFLASH = Packaging(
    "Laguna", lambda config: LAGUNA in fields.architectures(config), read_laguna
)
