"""How one generation runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.sample_utils import greedy_sampler

from dflash_mlx.decode.acceptance import LogitsProcessor
from dflash_mlx.decode.guide import Guide
from dflash_mlx.decode.randomness import RandomState, ThreadState
from dflash_mlx.decode.sampling import Sampler


@dataclass(frozen=True)
class Options:
    """How a generation runs; the names and meanings of mlx_lm's `generate_step`.

    `sample_proposals` draws proposals from the draft's own distribution where the sampler is from
    our `make_sampler`; otherwise they are the draft's likeliest tokens. None leaves it to the
    draft. `random_state` is what such a sampler draws from. `guide` rules what the text may be.
    `copies` lets a policy that learns propose earlier text again.
    """

    max_tokens: int = 256
    stop_tokens: frozenset[int] = frozenset()
    sampler: Sampler = greedy_sampler
    logits_processors: Sequence[LogitsProcessor] = ()
    prefill_step_size: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START
    prompt_progress_callback: Callable[[int, int], None] = lambda done, total: None
    sample_proposals: bool | None = None
    random_state: RandomState = field(default_factory=ThreadState)
    guide: Guide | None = None
    copies: bool = True
