"""What one request asks of the model, already tokenized, and what it is told while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from mlx_lm.sample_utils import make_logits_processors

from dflash_mlx.decode import LogitsProcessor, Sampler, make_sampler
from dflash_mlx.errors import DFlashError
from dflash_mlx.server.structured import Grammar, GrammarGuide


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and meanings are mlx_lm's, and so are the defaults.

    Attributes:
        seed: of this request's own random numbers; None draws one.
        logit_bias: (token id, what is added to its logit) pairs.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] = ()
    seed: int | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20
    logit_bias: tuple[tuple[int, float], ...] = ()

    def sampler(self) -> Sampler:
        """The sampler that draws so."""
        return make_sampler(
            temp=self.temperature,
            top_p=self.top_p,
            min_p=self.min_p,
            top_k=self.top_k,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=list(self.xtc_special_tokens),
        )

    def processors(self) -> list[LogitsProcessor]:
        """mlx_lm's logits processors for the penalties and biases; none where they do nothing."""
        repetition = self.repetition_penalty
        return make_logits_processors(
            logit_bias=dict(self.logit_bias) or None,
            repetition_penalty=None if repetition == 1.0 else repetition,
            repetition_context_size=self.repetition_context_size,
            presence_penalty=self.presence_penalty,
            presence_context_size=self.presence_context_size,
            frequency_penalty=self.frequency_penalty,
            frequency_context_size=self.frequency_context_size,
        )


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        prompt: the whole prompt; what a cache holds of it is found by the engine.
        max_tokens: the most tokens to emit; -1: as many as the model has positions.
        boundaries: counts of prompt tokens at which later prompts may part from this one: the end
            of the system message and tools; the end of what the next turn will surely repeat.
        own: tokens of the prompt from here on are not what a next turn surely repeats; None: those
            behind the last boundary.
        sampling: how tokens are chosen.
        stop_tokens: ids that end the text; None: the tokenizer's.
        verify_length, tree: as for `stream_generate`.
        grammar: what the text must look like; None: anything.
        logprobs: whether each token comes with its log-probability.
        top_logprobs: how many of the likeliest tokens come with theirs.
    """

    prompt: tuple[int, ...]
    max_tokens: int = -1
    boundaries: tuple[int, ...] = ()
    own: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] | None = None
    verify_length: int | str | None = "auto"
    tree: int | str = "off"
    grammar: Grammar | None = None
    logprobs: bool = False
    top_logprobs: int = 0


class EmittedToken(NamedTuple):
    """One token; log-probabilities are natural, before the sampler, None where nobody asked."""

    id: int
    from_draft: bool
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """The request's first turn began.

    Attributes:
        cached: prompt tokens that need not be run.
        missed: what kept more of an earlier prompt from being used, in words; None where nothing.
    """

    cached: int
    missed: str | None = None


@dataclass(frozen=True)
class Tokens:
    """What one cycle emitted."""

    tokens: tuple[EmittedToken, ...]


@dataclass(frozen=True)
class Figures:
    """What one request did.

    Attributes:
        prompt_tokens, cached: tokens of the prompt, and those a cache held already.
        generation_tokens: tokens emitted.
        queued_s: seconds in the queue.
        first_token_s: from submission to the first token, the queue included; 0 without a token.
        prompt_tps: prompt tokens run a second.
        generation_tps: tokens a second from the first token on, other requests' turns included.
        acceptance_length, verify_length, plain_share, target_forwards, proposed, accepted, copied:
            as in GenerationResponse.
        peak_memory: in GB.
    """

    prompt_tokens: int = 0
    cached: int = 0
    generation_tokens: int = 0
    queued_s: float = 0.0
    first_token_s: float = 0.0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    acceptance_length: float = 0.0
    verify_length: float = 0.0
    plain_share: float = 0.0
    target_forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    copied: int = 0
    peak_memory: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The last event of a request that did not fail: "stop", "length" or "cancelled".

    A text that the listener ended by `Ticket.stop` finishes with "stop".
    """

    reason: str
    figures: Figures


@dataclass(frozen=True)
class Failed:
    """The last event of a request that failed; `error` is one sentence."""

    error: str
    figures: Figures


class Busy(DFlashError):
    """The queue is full; try again in `retry_after` seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"All places in the queue are taken; try again in {retry_after} seconds.")
        self.retry_after = retry_after


class TooLong(DFlashError):
    """A prompt that cannot be run: it has more tokens than the model's positions or memory."""

    def __init__(self, message: str, prompt_tokens: int, most: int):
        super().__init__(message)
        self.prompt_tokens, self.most = prompt_tokens, most


class Ticket:
    """A submitted request, as its owner holds it. All methods may be called from any thread."""

    def __init__(self, job: Job, wake: Callable[[], None], guide: GrammarGuide | None = None):
        self.job, self.guide = job, guide
        self.cancelled = False
        self.stop_at: int | None = None
        self._wake = wake

    def cancel(self) -> None:
        """End the request within one prefill chunk or cycle; "cancelled" is then its last event."""
        self.cancelled = True
        self._wake()

    def stop(self, at: int) -> None:
        """The text ends behind its first `at` tokens, whatever more was emitted.

        Called inside the listener it holds at once, and the cache then stands for these tokens.
        Called later it holds from the next cycle on.
        """
        self.stop_at = at
        self._wake()
