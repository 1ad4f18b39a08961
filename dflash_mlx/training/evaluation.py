"""What a draft in training is worth: its acceptance length in the decode loop."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import stream_generate
from dflash_mlx.checkpoint import build_draft
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.dtype import parameters
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.target import TargetView
from dflash_mlx.training.batches import Sample
from dflash_mlx.training.data import opening

MAX_TOKENS = 128  # of an answer


@dataclass(frozen=True)
class Evaluation:
    """The decode loop on held-out prompts.

    Attributes:
        step: after how many steps.
        acceptance_length: tokens after each answer's first one per target forward, the whole
            block verified.
        tokens: emitted, over all prompts.
        accuracy: for each place of a block, the share of held-out blocks whose most likely token
            was right there.
    """

    step: int
    acceptance_length: float
    tokens: int
    accuracy: list[float]


def acceptance_length(
    view: TargetView,
    tokenizer: TokenizerWrapper,
    draft: DFlashDraft,
    held_out: Sequence[Sample],
    progress: Callable[[int, int], None] = lambda done, total: None,
    enough: Callable[[], bool] = lambda: False,
) -> tuple[float, int]:
    """Answer the openings of held-out samples greedily.

    Args:
        progress: called with prompts answered and their number.
        enough: asked after every token whether to leave it at that.

    Returns:
        The acceptance length, and the tokens.
    """
    # A copy: the decode loop joins weights that training goes on changing one by one.
    weights = {name: mx.array(array) for name, array in parameters(draft).items()}
    pair = SpeculativeModel(view.model, build_draft(draft.config, weights))
    first = tokens = forwards = 0
    for done, sample in enumerate(held_out):
        progress(done, len(held_out))
        prompt = sample.tokens[: opening(sample)].tolist()
        written = stream_generate(pair, tokenizer, prompt, MAX_TOKENS, verify_length=None)
        with closing(written):
            for last in written:
                if last.generation_tokens > 1 and enough():
                    break
        first += 1
        tokens += last.generation_tokens
        forwards += last.target_forwards
        if enough():
            break
    return (tokens - first) / max(1, forwards), tokens
