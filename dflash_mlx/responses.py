"""What a caller gets for every token: its text, and what speculation did so far."""

import time
from collections.abc import Generator
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.decode import Decoder
from dflash_mlx.stop_strings import StopStrings
from dflash_mlx.tokens import add_token


@dataclass
class GenerationResponse:
    """One emitted token: mlx_lm's fields, and what speculation did so far.

    Attributes:
        text: the next segment of text; it can be empty.
        token: the token id.
        logprobs: [V] log-probabilities that it was chosen from, before the sampler.
        from_draft: whether it was an accepted proposal, drafted or copied.
        prompt_tokens, prompt_tps: tokens of the prompt, and how many a second were run.
        generation_tokens, generation_tps: tokens emitted, and how many a second.
        peak_memory: in GB.
        finish_reason: "stop", "length" or None while it goes on.
        stop_string: the stop string that ended the text; None where something else did.
        target_forwards: forwards of the target after the prefill.
        proposed, accepted: proposals verified, and how many of them were emitted.
        copies, copied: of either, those that were copied from the text.
        acceptance_length: mean tokens emitted per target forward, bonus token included.
        verify_length: mean proposals verified per target forward that verified any.
        plain_share: share of the target's forwards that verified none.
        drafting_off: why "auto" had stopped drafting when the text ended, as half a sentence.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    stop_string: str | None = None
    target_forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    copies: int = 0
    copied: int = 0
    acceptance_length: float = 0.0
    verify_length: float = 0.0
    plain_share: float = 0.0
    drafting_off: str | None = None


def responses(
    decoder: Decoder,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    refill: list[int],
    stops: StopStrings,
) -> Generator[GenerationResponse, None, None]:
    """Run a generation: one response for each of its tokens.

    Args:
        prompt, refill: as for `Decoder.run`.
        stops: the strings that end the text.
    """
    detokenizer = tokenizer.detokenizer
    counts = decoder.statistics
    prompt_tps, tic = 0.0, time.perf_counter()
    for token in decoder.run(prompt, refill):
        if counts.emitted == 1:
            prompt_tps = (len(refill) + len(prompt)) / (time.perf_counter() - tic)
            tic = time.perf_counter()
        stopped = token.id in decoder.options.stop_tokens
        if not stopped:
            add_token(detokenizer, token.id)
        if decoder.finished:
            detokenizer.finalize()
        text = stops.feed(detokenizer.last_segment, last=decoder.finished)
        if stops.found is not None:
            stopped = True
            decoder.stop()
        yield GenerationResponse(
            text=text,
            token=token.id,
            logprobs=token.logprobs,
            from_draft=token.from_draft,
            prompt_tokens=len(prompt),
            prompt_tps=prompt_tps,
            generation_tokens=counts.emitted,
            generation_tps=counts.emitted / (time.perf_counter() - tic),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=("stop" if stopped else "length") if decoder.finished else None,
            stop_string=stops.found,
            target_forwards=counts.target_forwards,
            proposed=counts.proposed,
            accepted=counts.accepted,
            copies=counts.copies,
            copied=counts.copied,
            acceptance_length=counts.acceptance_length,
            verify_length=counts.verify_length,
            plain_share=counts.plain_share,
            drafting_off=decoder.policy.reason if decoder.finished else None,
        )
