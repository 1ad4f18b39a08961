"""The draft model: configuration, layers, context memory, and the published formats."""

from dflash_mlx.draft.absent import NoDraft
from dflash_mlx.draft.config import DraftConfig
from dflash_mlx.draft.context import Context, LayerGroup
from dflash_mlx.draft.model import DFlashDraft
from dflash_mlx.draft.proposals import Choice
from dflash_mlx.propose import Proposals

__all__ = [
    "Choice",
    "Context",
    "DFlashDraft",
    "DraftConfig",
    "LayerGroup",
    "NoDraft",
    "Proposals",
]
