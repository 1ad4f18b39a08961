"""The figures of one answer."""

from dataclasses import dataclass

from dflash_mlx.responses import GenerationResponse


@dataclass(frozen=True)
class Figures:
    """What one generation did.

    Attributes:
        acceptance_length: mean tokens per target forward.
        generation_tps: tokens a second, as mlx_lm counts.
        tokens: tokens emitted.
        first_token_seconds: from the call to the first token.
        prompt_tokens: tokens of the whole prompt.
        reused_tokens: how many of them a cache already held; None without a cache.
        peak_memory: in GB.
        target_forwards, proposed, accepted, verify_length, plain_share, drafting_off: as in
            GenerationResponse.
        copies, copied: likewise.
    """

    acceptance_length: float
    generation_tps: float
    tokens: int
    first_token_seconds: float
    prompt_tokens: int
    reused_tokens: int | None
    peak_memory: float
    target_forwards: int
    proposed: int
    accepted: int
    verify_length: float
    plain_share: float
    drafting_off: str | None
    copies: int = 0
    copied: int = 0

    @classmethod
    def of(cls, last: GenerationResponse) -> "Figures":
        """The figures of a generation without a cache, from its last response."""
        return cls(
            acceptance_length=last.acceptance_length,
            generation_tps=last.generation_tps,
            tokens=last.generation_tokens,
            first_token_seconds=last.prompt_tokens / last.prompt_tps,
            prompt_tokens=last.prompt_tokens,
            reused_tokens=None,
            peak_memory=last.peak_memory,
            target_forwards=last.target_forwards,
            proposed=last.proposed,
            accepted=last.accepted,
            copies=last.copies,
            copied=last.copied,
            verify_length=last.verify_length,
            plain_share=last.plain_share,
            drafting_off=last.drafting_off,
        )
