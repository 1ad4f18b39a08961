"""The draft model: configuration, layers and context memory."""

from dflash_mlx.draft.config import DraftConfig
from dflash_mlx.draft.context import Context
from dflash_mlx.draft.model import DFlashDraft
from dflash_mlx.draft.proposals import Proposals

__all__ = ["Context", "DFlashDraft", "DraftConfig", "Proposals"]
