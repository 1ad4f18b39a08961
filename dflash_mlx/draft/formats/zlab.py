"""z-lab's packaging of DFlash 1 and 2, and its kin: MiMo's windows, hybrids with a Markov chain.

A flat Qwen3 config with `dflash_config`; no embedding and no head as a rule.
"""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, SLIDING, DraftConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.rope import ropes
from dflash_mlx.draft.schema import Flag, Integer, Number, read

DFLASH1 = "DFlashDraftModel"
DFLASH2 = "DFlash2DraftModel"

_FIELDS = (
    *fields.BACKBONE,
    *fields.VOCABULARY,
    *fields.TARGET,
    *fields.MARKOV,
    fields.SWISH,
    fields.BLOCK,
    fields.MASK,
    fields.CAP,
    Flag("is_causal", None),
    Flag("causal", None),
    Flag("use_swa", False),
    Integer("swa_window_size", None, most=2**31),
    Flag("attention_sink_bias", False),
    Flag("sample_from_anchor", None),
    fields.EAGLE_TAPS,
    Number("input_embedding_scale", 1.0),
    Number("output_multiplier", 1.0),
)


def read_zlab(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """A flat config with `dflash_config`.

    Raises:
        CheckpointError: a value is missing or cannot be.
    """
    values = read(_FIELDS, config, "dflash_config")
    second = fields.architecture(config) == DFLASH2
    size = fields.backbone(values)
    swa = values["use_swa"] and values["swa_window_size"] is not None
    if swa:
        # All layers slide, whatever layer_types says.
        types, window = (SLIDING,) * values["num_hidden_layers"], values["swa_window_size"]
    else:
        types, window = fields.kinds(values, SLIDING if second else FULL)
    causal = values["is_causal"] if values["causal"] is None else values["causal"]
    # As in the authors' own runtime; with MiMo's keys nothing is causal unless it says so.
    usual = {FULL: False, SLIDING: not swa}
    causing = usual if causal is None else {FULL: causal, SLIDING: causal}
    shared = ropes(config, values["max_position_embeddings"], share=swa)
    anchor = fields.anchor_rows(rows, values["sample_from_anchor"] or False)
    heads = fields.markov(values)
    if second:
        heads |= fields.second(
            read(fields.SECOND, config, "dflash_config"), size["hidden_size"], values["vocab_size"]
        )
    return DraftConfig(
        packaging="DFlash 2" if second else "DFlash 1",
        architecture=DFLASH2 if second else DFLASH1,
        **size,
        **fields.block(values, anchor),
        layers=fields.layers(
            types,
            shared,
            window,
            causing,
            sinks=fields.sink_layers(shapes, values["attention_sink_bias"]),
        ),
        vocabulary=fields.vocabulary(values, shapes),
        attention=fields.attention(values),
        input_scale=values["input_embedding_scale"],
        output_multiplier=values["output_multiplier"],
        **heads,
    )


def _matches(config: Mapping[str, Any]) -> bool:
    names = fields.architectures(config)
    return bool({DFLASH1, DFLASH2} & {*names}) or (not names and "dflash_config" in config)


ZLAB = Packaging(
    "DFlash",
    _matches,
    read_zlab,
    renamed=(("mask_embedding.weight", "mask_embedding"),),
)
