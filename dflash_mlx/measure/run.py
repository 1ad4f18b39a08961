"""One timed generation, plain or with DFlash."""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate as plain_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import stream_generate
from dflash_mlx.decode import make_sampler
from dflash_mlx.decode.options import AnswerOptions, RunOptions, values_of
from dflash_mlx.measure.collectives import Collectives
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.stop_strings import StopStrings


@dataclass(frozen=True, kw_only=True)
class Settings(AnswerOptions, RunOptions):
    """What the generations of a comparison share.

    With `temp` above 0, `seed` is set before every run.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int = 0

    def plain_arguments(self) -> dict[str, Any]:
        """The keyword arguments of mlx_lm's `stream_generate`."""
        sampler = make_sampler(self.temp, self.top_p, self.min_p, top_k=self.top_k)
        return {**values_of(RunOptions, self), "sampler": sampler}

    def dflash_arguments(self) -> dict[str, Any]:
        """The keyword arguments of our `stream_generate`."""
        return self.plain_arguments() | values_of(AnswerOptions, self)


@dataclass(frozen=True)
class Forward:
    """One target forward after the prefill: proposals verified, and how many were accepted.

    Of a tree they are not one for each position.
    """

    proposed: int
    accepted: int
    emitted: int
    tree: bool = False
    copied: bool = False


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        tokens: ids emitted, the stop token included.
        first_seconds: from the call to the first token.
        decode_seconds: from the first token to the last.
        peak_memory: in GB, the model's weights included.
        forwards: target forwards after the prefill; empty for a plain run.
        collectives: how often all ranks had to exchange numbers, from the prompt's last token on;
            None where there is one process.
    """

    tokens: list[int]
    first_seconds: float
    decode_seconds: float
    peak_memory: float
    forwards: list[Forward]
    collectives: int | None = None

    @property
    def decoded(self) -> int:
        """Tokens after the first one, which the prefill gives."""
        return len(self.tokens) - 1


def plain_run(
    model: SpeculativeModel, tokenizer: TokenizerWrapper, prompt: Sequence[int], settings: Settings
) -> Run:
    """Unmodified mlx_lm on the pair's target; `prompt` are token ids."""
    _prepare(settings)
    with Collectives(model.ranks) as collectives:
        arguments = settings.plain_arguments() | {"prompt_progress_callback": collectives.progress}
        responses = plain_stream_generate(model.target, tokenizer, list(prompt), **arguments)
        return replace(_timed(_until(responses, settings.stop)), collectives=collectives.count)


def dflash_run(
    model: SpeculativeModel, tokenizer: TokenizerWrapper, prompt: Sequence[int], settings: Settings
) -> Run:
    """The pair with DFlash; `prompt` are token ids."""
    _prepare(settings)
    with Collectives(model.ranks) as collectives:
        arguments = {
            "prompt_progress_callback": collectives.progress,
            **settings.dflash_arguments(),
        }
        responses = stream_generate(model, tokenizer, list(prompt), **arguments)
        return replace(
            _timed(responses, settings.tree not in (0, "off")), collectives=collectives.count
        )


def _prepare(settings: Settings) -> None:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    if settings.temp > 0:
        mx.random.seed(settings.seed)


def _until(responses: Iterable[Any], stop: str | Iterable[str] | None) -> Iterator[Any]:
    """Plain mlx_lm's responses up to a stop string, which it does not know."""
    stops = StopStrings(stop)
    for response in responses:
        stops.feed(response.text)
        yield response
        if stops.found is not None:
            return


def _timed(responses: Iterable[Any], tree: bool = False) -> Run:
    tokens: list[int] = []
    forwards: list[Forward] = []
    proposed = accepted = emitted = copies = seen = 0
    copied = False
    first = end = tic = time.perf_counter()
    for r in responses:
        end = time.perf_counter()
        if not tokens:
            first = end
        tokens.append(int(r.token))
        if getattr(r, "target_forwards", 0) > seen:
            # The first token of a new forward: what came before it belongs to the last one.
            if seen:
                forwards.append(Forward(proposed, accepted, emitted, tree, copied))
            proposed, accepted, emitted = r.proposed - sum(f.proposed for f in forwards), 0, 0
            seen, copied, copies = r.target_forwards, r.copies > copies, r.copies
        accepted += bool(r.from_draft)
        emitted += 1
    if seen:
        forwards.append(Forward(proposed, accepted, emitted, tree, copied))
    return Run(tokens, first - tic, end - first, mx.get_peak_memory() / 1e9, forwards)
