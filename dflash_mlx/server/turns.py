"""One request while it runs, in turns: a prefill chunk or a cycle each."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from dflash_mlx.api import make_decoder
from dflash_mlx.conversation.positions import max_positions
from dflash_mlx.decode import Decoder, Options, Prefilled, Token
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.server.job import (
    EmittedToken,
    Figures,
    Finished,
    Job,
    Started,
    Ticket,
    Tokens,
)

Listener = Callable[[Any], None]


class Sequence:
    """A request that has a place. Every method runs on the engine's thread.

    Attributes:
        ticket: what its owner holds.
        prefilling: whether its next turn is a prefill chunk.
        figures: what it did so far.
        run_tokens: prompt tokens run so far.
        ending: how it ended, once its last turn is over.
    """

    def __init__(
        self,
        model: SpeculativeModel,
        ticket: Ticket,
        listener: Listener,
        submitted: float,
        options: Options,
        chunk: Callable[[], int],
    ):
        self.ticket, self.prefilling = ticket, True
        self.listener = listener
        self._model, self._options, self._chunk = model, options, chunk
        self.submitted = submitted
        prompt_tokens = len(ticket.job.prompt)
        queued = time.perf_counter() - submitted
        self.figures = Figures(prompt_tokens=prompt_tokens, queued_s=queued)
        self.ending: Finished | None = None
        self.run_tokens = 0
        self._decoder: Decoder | None = None
        self._turns = self._run(ticket.job)

    def turn(self) -> bool:
        """Take one turn; whether there are more.

        Raises:
            Exception: whatever broke it. It then has ended.
        """
        return next(self._turns, None) is not None

    def spoil(self) -> None:
        """Another sequence had a turn since this one's last."""
        if self._decoder is not None:
            self._decoder.spoil()

    def close(self) -> None:
        """End it where it stands."""
        self._turns.close()

    def _run(self, job: Job) -> Generator[bool, None, None]:
        prompt = list(job.prompt)
        options = self._settle(job)
        cache = self._model.make_cache()
        cached = len(cache.tokens)
        self.figures = replace(self.figures, cached=cached)
        self.listener(Started(cached))
        started = time.perf_counter()
        filler = make_decoder(self._model, cache, options, None)
        with closing(filler.fill(prompt[cached:-1], self._chunk)) as chunks:
            for chunk in chunks:
                self.run_tokens = chunk.done
                seconds = time.perf_counter() - started
                self.figures = replace(self.figures, prompt_tps=chunk.done / seconds)
                self.listener(Prefilled(cached + chunk.done, len(prompt)))
                yield True
        self.prefilling = False
        self._decoder = make_decoder(self._model, cache, options, job.verify_length)
        with closing(self._decoder.steps(prompt[-1:], whole_history=True)) as steps:
            for step in steps:
                if not isinstance(step, Prefilled):
                    self._emit(step, self._decoder, job)
                    yield True
        stopped = self.ticket.stop_at is not None or cache.tokens[-1] in options.stop_tokens
        self.ending = Finished("stop" if stopped else "length", self.figures)

    def _settle(self, job: Job) -> Options:
        sampling = job.sampling
        return replace(
            self._options,
            max_tokens=self._room(job),
            stop_tokens=self._options.stop_tokens if job.stop_tokens is None else job.stop_tokens,
            sampler=sampling.sampler(),
            logits_processors=tuple(sampling.processors()),
        )

    def _room(self, job: Job) -> int:
        positions = max_positions(self._model.target)
        if positions is None:
            return job.max_tokens
        room = positions - len(job.prompt)
        return room if job.max_tokens < 0 else min(job.max_tokens, room)

    def _emit(self, cycle: Iterator[Token], decoder: Decoder, job: Job) -> None:
        tokens = list(cycle)
        counts, now = decoder.statistics, time.perf_counter()
        if self.figures.first_token_s == 0:
            self._first = now
            self.figures = replace(self.figures, first_token_s=now - self.submitted)
        self.figures = replace(
            self.figures,
            generation_tokens=counts.emitted,
            generation_tps=(counts.emitted - 1) / max(now - self._first, 1e-9),
            acceptance_length=counts.acceptance_length,
            verify_length=counts.verify_length,
            plain_share=counts.plain_share,
            target_forwards=counts.target_forwards,
            proposed=counts.proposed,
            accepted=counts.accepted,
            peak_memory=mx.get_peak_memory() / 1e9,
        )
        self.listener(Tokens(tuple(_told(tokens, job))))
        stop_at = self.ticket.stop_at
        if stop_at is not None:
            decoder.stop(retract=max(counts.emitted - stop_at, 0))


def _told(tokens: list[Token], job: Job) -> Iterator[EmittedToken]:
    """Tokens with the log-probabilities that were asked for, read in one go."""
    if not job.logprobs:
        yield from (EmittedToken(t.id, t.from_draft) for t in tokens)
        return
    rows = np.array(mx.stack([t.logprobs for t in tokens]).astype(mx.float32))
    for token, row in zip(tokens, rows, strict=True):
        # Ties by id, so that the order is one and the same everywhere.
        likeliest = np.argsort(-row, kind="stable")[: job.top_logprobs]
        top = tuple((int(i), float(row[i])) for i in likeliest)
        yield EmittedToken(token.id, token.from_draft, float(row[token.id]), top)
