"""From a block's hidden states and base logits to proposals: a small class for each way."""

from dflash_mlx.draft.config import (
    CorrectionConfig,
    DraftConfig,
    MarkovConfig,
    RefinerConfig,
    SelectorConfig,
)
from dflash_mlx.draft.heads.block import Block, Head
from dflash_mlx.draft.heads.confidence import ConfidenceHead
from dflash_mlx.draft.heads.correction import HiddenCorrection
from dflash_mlx.draft.heads.markov import MarkovHead
from dflash_mlx.draft.heads.plain import PlainRows
from dflash_mlx.draft.heads.refiner import Refiner
from dflash_mlx.draft.heads.selector import CandidateSelector

__all__ = ["Block", "ConfidenceHead", "Head", "PlainRows", "make_head"]


def make_head(config: DraftConfig) -> Head:
    """The head that a config asks for."""
    dim, size, head = config.hidden_size, config.vocabulary.size or 0, config.head
    rows = config.vocabulary.draft_size or size
    if isinstance(head, SelectorConfig):
        return CandidateSelector(dim, size, head)
    if isinstance(head, MarkovConfig):
        return MarkovHead(dim, size, rows, head)
    if isinstance(head, RefinerConfig):
        return Refiner(dim, size, rows, config.block_size, head)
    if isinstance(head, CorrectionConfig):
        return HiddenCorrection(dim, head, config.rms_norm_eps)
    return PlainRows()
