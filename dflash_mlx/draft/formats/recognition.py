"""Which packaging a config.json is of; and those that are refused, by name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dflash_mlx.draft.config import DraftConfig
from dflash_mlx.draft.formats import fields
from dflash_mlx.draft.formats.deepspec import DEEPSPEC_GEMMA4, DEEPSPEC_QWEN3
from dflash_mlx.draft.formats.dfly import DFLY_ANGELSLIM
from dflash_mlx.draft.formats.laguna import LAGUNA_DFLASH
from dflash_mlx.draft.formats.muse import MUSE_ASSISTANT
from dflash_mlx.draft.formats.nvidia import NVIDIA_DSPARK
from dflash_mlx.draft.formats.packaging import AS_FILED, Packaging, Rows, Shapes
from dflash_mlx.draft.formats.quantization import quantization
from dflash_mlx.draft.formats.specforge import LIQUID_DSPARK, SPECFORGE_DSPARK
from dflash_mlx.draft.formats.speculators import NAMES, SPECULATORS
from dflash_mlx.draft.formats.zlab import ZLAB
from dflash_mlx.errors import CheckpointError

# In the order in which they are asked: some class names are shared.
PACKAGINGS = (
    SPECULATORS,
    DEEPSPEC_QWEN3,
    DEEPSPEC_GEMMA4,
    NVIDIA_DSPARK,
    SPECFORGE_DSPARK,
    LIQUID_DSPARK,
    LAGUNA_DFLASH,
    MUSE_ASSISTANT,
    DFLY_ANGELSLIM,
    ZLAB,
)
_SUPPORTED = (
    "DFlash 1 and 2, DSpark (DeepSpec, SpecForge, LiquidAI, NVIDIA, speculators), XPress, Laguna, "
    "the Muse assistant and DFly"
)
# What no reader reads, and why it would run wrongly.
_REFUSED_CLASSES = {
    "Qwen35DSparkModel": "Qwen35DSparkModel, whose attention is gated and partly rotated",
    "Domino": "a Domino draft, whose blocks are made by another rule",
    "PEagle": "a P-EAGLE draft, which is no block of masks",
    "P-EAGLE": "a P-EAGLE draft, which is no block of masks",
    "Eagle": "an EAGLE draft, which proposes one token at a time",
    "EAGLE": "an EAGLE draft, which proposes one token at a time",
    "Medusa": "a Medusa draft, which is no block of masks",
}
_REFUSED_TYPES = {
    "eagle3": "an EAGLE-3 draft, which proposes one token at a time",
    "eagle": "an EAGLE draft, which proposes one token at a time",
    "peagle": "a P-EAGLE draft, which is no block of masks",
    "mtp": "an MTP head, which proposes one token at a time",
}


def recognise(config: Mapping[str, Any]) -> Packaging:
    """The packaging of a config.json.

    Raises:
        CheckpointError: it is one that is refused, or none that is known; the message names it.
    """
    _refuse(config)
    for packaging in PACKAGINGS:
        if packaging.matches(config):
            return packaging
    names = fields.architectures(config)
    said = ", ".join(names) if names else f"model_type {str(config.get('model_type'))[:60]!r}"
    raise CheckpointError(
        f"This is no draft of a format that is supported: its config.json says {said}; supported "
        f"are {_SUPPORTED}."
    )


def draft_config(
    config: Mapping[str, Any],
    shapes: Shapes | None = None,
    rows: Rows = AS_FILED,
    packaging: Packaging | None = None,
) -> DraftConfig:
    """A config.json as the one config.

    Args:
        config: as published.
        shapes: of the tensors in the files, by our names; None where they are not at hand.
        rows: the user's decision on which rows propose.
        packaging: if it is known already.

    Raises:
        CheckpointError: the format is not supported, or a value is missing or cannot be.
    """
    packaging = packaging or recognise(config)
    _refuse_weights(shapes or {})
    found = packaging.read(config, shapes or {}, rows)
    return replace(found, quantization=quantization(config))


def embeds_draft(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a whole target with a draft in it, as DeepSeek V4's are."""
    names = config.get("architectures")
    words = str(names) if isinstance(names, list) else ""
    embedded = any(str(key).startswith("dspark_") for key in config)
    return embedded and not ("DSpark" in words or "DFlash" in words)


def _refuse(config: Mapping[str, Any]) -> None:
    kind = config.get("speculators_model_type")
    if isinstance(kind, str) and kind not in NAMES:
        what = _REFUSED_TYPES.get(kind, f"a speculators draft of the type {kind[:60]}")
        raise CheckpointError(f"This is {what}; supported are {_SUPPORTED}.")
    names = fields.architectures(config)
    for name in names:
        for part, what in _REFUSED_CLASSES.items():
            if part in name:
                raise CheckpointError(f"This is {what}; supported are {_SUPPORTED}.")
    dflash = config.get("dflash_config")
    projector = dflash.get("projector_type") if isinstance(dflash, dict) else None
    if projector not in (None, "dspark", "dflash"):
        what = "a Domino draft" if projector == "domino" else f"a {str(projector)[:60]} projector"
        raise CheckpointError(
            f"This is {what}, whose blocks are made by another rule; supported are {_SUPPORTED}."
        )
    if config.get("log_snr_conditioning"):
        raise CheckpointError(_BONSAI)
    if embeds_draft(config):
        raise CheckpointError(
            "This is a whole target (DeepSeek V4) with a draft embedded in it, not a draft of its "
            f"own; supported are {_SUPPORTED}."
        )


_BONSAI = (
    f"This is a Bonsai draft, which is conditioned on noise (log_snr_embed); supported are "
    f"{_SUPPORTED}."
)


def _refuse_weights(shapes: Shapes) -> None:
    if any("log_snr_embed" in name for name in shapes):
        raise CheckpointError(_BONSAI)
    if any(
        name.endswith((".weight_scale_2", ".weight_scale", ".weight_packed")) for name in shapes
    ):
        raise CheckpointError(
            "The draft's weights are quantized in a layout other than MLX's (NVIDIA's NVFP4 or "
            "compressed-tensors); give the same draft with plain weights, or a conversion for MLX."
        )
