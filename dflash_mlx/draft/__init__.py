"""The draft model: configuration, layers and context memory."""

from dflash_mlx.draft.config import DraftConfig
from dflash_mlx.draft.context import Context, LayerGroup
from dflash_mlx.draft.dflash2 import DFlash2Draft
from dflash_mlx.draft.model import DFlashDraft
from dflash_mlx.draft.proposals import Choice, Proposals

__all__ = [
    "Choice",
    "Context",
    "DFlash2Draft",
    "DFlashDraft",
    "DraftConfig",
    "LayerGroup",
    "Proposals",
]
