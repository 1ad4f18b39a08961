"""Where DFlash's text leaves plain decoding's, and how close the target's choice was there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from mlx_lm import stream_generate as plain_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.measure.run import Settings
from dflash_mlx.pairs import SpeculativeModel


@dataclass(frozen=True)
class Difference:
    """The first differing token.

    Attributes:
        position: its index among the emitted tokens.
        plain, dflash: what either emitted there; None where one text had ended.
        margin: difference of the two largest log-probabilities that plain decoding saw there.
    """

    position: int
    plain: str | None
    dflash: str | None
    margin: float


def first_difference(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    plain: Sequence[int],
    dflash: Sequence[int],
    settings: Settings,
) -> Difference:
    """Compare two lists of emitted ids that differ; costs a plain run up to the difference."""
    position = next(
        (i for i, (a, b) in enumerate(zip(plain, dflash, strict=False)) if a != b),
        min(len(plain), len(dflash)),
    )
    arguments = {**settings.plain_arguments(), "max_tokens": position + 1}
    logprobs = mx.zeros(2)
    if settings.temp > 0:
        mx.random.seed(settings.seed)
    for response in plain_stream_generate(model.target, tokenizer, list(prompt), **arguments):
        logprobs = response.logprobs
    a, b = cast(list[float], mx.topk(logprobs.astype(mx.float32), 2).tolist())

    def text(tokens: Sequence[int]) -> str | None:
        return tokenizer.decode([tokens[position]]) if position < len(tokens) else None

    return Difference(position, text(plain), text(dflash), abs(a - b))
