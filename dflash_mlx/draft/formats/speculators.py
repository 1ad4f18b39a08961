"""The packaging of vLLM's speculators library: DFlash, DFlash 2, DSpark and XPress.

The backbone's config is nested in `transformer_layer_config`. The class names are those of other
packagings, so that `speculators_model_type` is asked first.
"""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, SLIDING, DraftConfig, RefinerConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.rope import ropes
from dflash_mlx.draft.schema import Field, Flag, Integer, Integers, Word, read
from dflash_mlx.errors import CheckpointError

KEY = "speculators_model_type"
NAMES = {"dflash": "DFlash", "dflash2": "DFlash 2", "dspark": "DSpark", "xpress": "XPress"}

_LAYERS = "transformer_layer_config"
_BACKBONE = (*fields.BACKBONE, *fields.VOCABULARY, fields.SWISH)
_TOP: tuple[Field, ...] = (
    Integer("block_size", 8, most=fields.MOST_ROWS),
    Integer("draft_vocab_size", None, most=fields.MOST_TOKENS),
    Integers("aux_hidden_state_layer_ids"),
    Integer("mask_token_id", least=0, most=fields.MOST_TOKENS),
    Integer("target_hidden_size", None, most=2**17),
    Flag("sliding_window_non_causal", None),
    Flag("sample_from_anchor", None),
    fields.CAP,
)
_DSPARK: tuple[Field, ...] = (
    Integer("markov_rank", 256, least=0, most=2**16),
    Word("markov_head_type", "vanilla", words=("vanilla", "gated", "rnn")),
    Flag("enable_confidence_head", True),
    Flag("confidence_head_with_markov", True),
)
_SECOND: tuple[Field, ...] = (
    Integer("conv_kernel_size", 2, most=64),
    Integer("conv_group_size", 16, most=2**17),
    Integer("selector_rank", 256, most=2**16),
    Integer("selector_top_k", 16, most=2**16),
)
_XPRESS: tuple[Field, ...] = (
    Integer("xpress_rank", 256, most=2**16),
    Integer("xpress_mlp_ratio", 2, most=64),
    Integer("num_jacobi_passes", 6, most=64),
)
_METHOD = (Integer("speculative_tokens", None, most=fields.MOST_ROWS),)


def read_speculators(config: Mapping[str, Any], shapes: Shapes, rows: Rows) -> DraftConfig:
    """One reader for the four; they differ in defaults and heads.

    Sliding layers show every row of a block the last window of context rows, as the library
    trains them. It rotates all layers as sliding ones where each kind has its own parameters.

    Raises:
        CheckpointError: a value is missing or cannot be, or nothing tells which rows propose.
    """
    kind = read((Word(KEY, words=tuple(NAMES)),), config)[KEY]
    top = read(_TOP, config)
    nested = fields.inner(config, _LAYERS)
    values = read(_BACKBONE, nested, label=_LAYERS)
    types, window = fields.kinds(values, FULL)
    bidirectional = top["sliding_window_non_causal"]
    if bidirectional is None:
        bidirectional = kind == "dflash2"
    anchor = _anchor(config, kind, top, rows)
    taps = tuple(i - 1 for i in top["aux_hidden_state_layer_ids"])
    size = fields.backbone(values)
    size["target_hidden_size"] = top["target_hidden_size"] or size["hidden_size"]
    shared = ropes(nested, values["max_position_embeddings"])
    if SLIDING in (nested.get("rope_parameters") or {}):
        shared[FULL] = shared[SLIDING]
    return DraftConfig(
        packaging=f"{NAMES[kind]} (speculators)",
        architecture=fields.architecture(config),
        **size,
        **fields.block(top | {"target_layer_ids": taps, "num_target_layers": None}, anchor),
        layers=fields.layers(
            types, shared, window, causal={FULL: False, SLIDING: not bidirectional}, anchored=True
        ),
        vocabulary=fields.vocabulary(values, shapes, _draft_size(kind, top, values, shapes)),
        attention=fields.attention(values),
        **_head(kind, config, size["hidden_size"], values["vocab_size"]),
    )


def _anchor(config: Mapping[str, Any], kind: str, top: Mapping[str, Any], rows: Rows) -> bool:
    """Whether the anchor's row proposes.

    Files of before July 2026 do not say, but for how many tokens they propose.
    """
    if rows.anchor is not None or top["sample_from_anchor"] is not None:
        return fields.anchor_rows(rows, top["sample_from_anchor"])
    methods = fields.inner(config, "speculators_config").get("proposal_methods")
    method = methods[0] if isinstance(methods, list) and methods else None
    tokens = None
    if isinstance(method, dict):
        label = "speculators_config.proposal_methods[0]"
        tokens = read(_METHOD, method, label=label)["speculative_tokens"]
    if tokens is not None and top["block_size"] - tokens in (0, 1):
        return tokens == top["block_size"]
    if kind != "dspark":
        return False
    raise CheckpointError(
        "The draft's config.json has neither sample_from_anchor nor a number of speculative_tokens "
        "that tells which rows of a block propose; decide with --draft-rows anchor or --draft-rows "
        "fill (draft_rows in Python), and keep the one with the higher acceptance length."
    )


def _draft_size(
    kind: str, top: Mapping[str, Any], values: Mapping[str, Any], shapes: Shapes
) -> int | None:
    """Rows of a reduced vocabulary, which there is where the files map it."""
    said = top["draft_vocab_size"]
    if "d2t" not in shapes:
        if shapes and said is not None and said < values["vocab_size"]:
            raise CheckpointError(
                f"The draft's config.json has draft_vocab_size {said} of {values['vocab_size']} "
                "tokens, and its weights have no d2t that says which."
            )
        return None
    if kind == "dflash2":
        raise CheckpointError("A DFlash 2 draft with a reduced vocabulary (d2t) is not supported.")
    if "lm_head.weight" not in shapes:
        raise CheckpointError("The draft's weights have d2t and lack lm_head.weight.")
    (rows,) = shapes["d2t"] if len(shapes["d2t"]) == 1 else (0,)
    if rows < 1 or rows > values["vocab_size"] or said not in (None, rows):
        raise CheckpointError(
            f"The draft's d2t is {list(shapes['d2t'])}, but its config.json makes it "
            f"[{said or values['vocab_size']}]."
        )
    return rows


def _head(
    kind: str, config: Mapping[str, Any], hidden_size: int, vocab_size: int
) -> dict[str, Any]:
    if kind == "dspark":
        return fields.markov(read(_DSPARK, config))
    if kind == "dflash2":
        return fields.second(read(_SECOND, config), hidden_size, vocab_size)
    if kind == "xpress":
        values = read(_XPRESS, config)
        names = ("xpress_rank", "xpress_mlp_ratio", "num_jacobi_passes")
        return {"head": RefinerConfig(*(values[name] for name in names))}
    return {}


SPECULATORS = Packaging(
    "speculators",
    lambda config: config.get(KEY) is not None,
    read_speculators,
    left_aside=("t2d", "verifier_"),
    kept_aside=("t2d",),
)
