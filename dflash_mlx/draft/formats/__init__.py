"""The published packagings of drafts: one reader each, names and keys -> the one config."""

from dflash_mlx.draft.formats.packaging import Packaging, Rows, Shapes
from dflash_mlx.draft.formats.recognition import (
    PACKAGINGS,
    draft_config,
    embeds_draft,
    recognise,
)

__all__ = ["PACKAGINGS", "Packaging", "Rows", "Shapes", "draft_config", "embeds_draft", "recognise"]
