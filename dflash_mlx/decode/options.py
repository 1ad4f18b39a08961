"""How a generation runs: each option stands here once, in groups.

`Options` is what the decode loop is told. `stream_generate` takes all three groups, and bench's
settings take those that need no function.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START

from dflash_mlx.decode.acceptance import LogitsProcessor
from dflash_mlx.decode.guide import Guide
from dflash_mlx.decode.randomness import RandomState, ThreadState
from dflash_mlx.decode.sampling import Sampler


@dataclass(frozen=True)
class RunOptions:
    """What plain decoding has, too; names and meanings are mlx_lm's."""

    max_tokens: int = 256
    _: KW_ONLY
    prefill_step_size: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START


@dataclass(frozen=True, kw_only=True)
class ChoosingOptions:
    """How tokens are chosen, and who is told how far a prompt has come.

    `sample_proposals` draws proposals from the draft's own distribution where the sampler is from
    our `make_sampler`; otherwise they are the draft's likeliest tokens. None leaves it to the
    draft.
    """

    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    prompt_progress_callback: Callable[[int, int], None] | None = None
    sample_proposals: bool | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What is proposed for an answer, and which strings end it; see `stream_generate`."""

    verify_length: int | str | None = "auto"
    tree: int | str = "off"
    copies: str = "auto"
    stop: str | Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Options(ChoosingOptions, RunOptions):
    """How the decode loop runs.

    `random_state` is what a sampler from our `make_sampler` draws from. `guide` rules what the text
    may be. `copies` lets a policy that learns propose earlier text again.
    """

    stop_tokens: frozenset[int] = frozenset()
    random_state: RandomState = field(default_factory=ThreadState)
    guide: Guide | None = None
    copies: bool = True


def values_of(group: type, options: Any) -> dict[str, Any]:
    """The values that options have for the fields of a group, by name."""
    return {f.name: getattr(options, f.name) for f in fields(group)}
