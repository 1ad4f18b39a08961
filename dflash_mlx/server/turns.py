"""One request while it runs, in turns: a prefill chunk or a cycle each."""

import secrets
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import make_decoder
from dflash_mlx.conversation.positions import max_positions
from dflash_mlx.conversation.prefixes import Lease, Parting
from dflash_mlx.decode import Decoder, Options, OwnState, Prefilled, PromptCache, Token
from dflash_mlx.server.job import (
    EmittedToken,
    Figures,
    Finished,
    Job,
    Started,
    Ticket,
    Tokens,
)
from dflash_mlx.server.memory import Memory
from dflash_mlx.server.orders import Turns

Listener = Callable[[Any], None]


class Sequence:
    """A request that has a place. Every method runs on the engine's thread.

    Attributes:
        ticket: what its owner holds.
        prefilling: whether its next turn is a prefill chunk.
        figures: what it did so far.
        run_tokens: prompt tokens run so far.
        ending: how it ended, once its last turn is over.
        deaf: what its listener raised; it is told nothing more then.
    """

    def __init__(
        self,
        memory: Memory,
        tokenizer: TokenizerWrapper,
        ticket: Ticket,
        listener: Listener,
        submitted: float,
        options: Options,
        chunk: Callable[[], int],
        turns: Turns,
    ):
        """
        Args:
            memory, tokenizer: the engine's.
            ticket, listener: the request, and who hears of it.
            submitted: when it came.
            options: of every generation; without stop tokens, the tokenizer's hold.
            chunk: the most tokens that a prefill chunk may have now.
            turns: what is asked while it runs.
        """
        self.ticket, self.prefilling = ticket, True
        self.listener = listener
        self.deaf: Exception | None = None
        self._memory, self._tokenizer = memory, tokenizer
        self._model = memory.prefixes.model
        ends = options.stop_tokens or frozenset(tokenizer.eos_token_ids)
        self._options = replace(options, stop_tokens=ends)
        self._chunk, self._asked = chunk, turns
        self._cache: PromptCache | None = None
        self._steps = 0
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

    def has_grown(self) -> bool:
        """Whether its caches are longer by a step of their buffers than when asked last."""
        steps = len(self._cache.tokens) // 256 if self._cache else 0
        before, self._steps = self._steps, steps
        return steps != before

    def close(self) -> None:
        """End it where it stands."""
        self._turns.close()

    def _run(self, job: Job) -> Generator[bool, None, None]:
        prompt, options = list(job.prompt), self._settle(job)
        lease = self._memory.prefixes.take(prompt, job.boundaries, job.own)
        try:
            self._cache = lease.cache
            self._memory.make_room(job, lease.cache.nbytes)
            self.figures = replace(self.figures, cached=lease.cached)
            self._asked.cached(lease.cached)
            self._tell(Started(lease.cached, self._missed(lease.parting)))
            yield from self._prefill(lease, options)
            self._decoder = make_decoder(
                self._model, lease.cache, options, job.verify_length, tree=job.tree
            )
            with closing(self._decoder.steps(prompt[-1:])) as steps:
                for step in steps:
                    if not isinstance(step, Prefilled):
                        self._emit(step, self._decoder, job)
                        yield True
            stopped = self.ticket.stop_at is not None
            stopped |= lease.cache.tokens[-1] in options.stop_tokens
            self.ending = Finished("stop" if stopped else "length", self.figures)
        finally:
            self._decoder = None
            lease.release()

    def _prefill(self, lease: Lease, options: Options) -> Generator[bool, None, None]:
        started = time.perf_counter()
        with closing(lease.fill(options, self._most)) as chunks:
            for chunk in chunks:
                self.run_tokens = chunk.done
                seconds = time.perf_counter() - started
                self.figures = replace(self.figures, prompt_tps=chunk.done / seconds)
                self._tell(Prefilled(lease.cached + chunk.done, self.figures.prompt_tokens))
                yield True
        self.prefilling = False

    def _most(self) -> int:
        return self._asked.chunk(self._chunk())

    def _tell(self, event: Any) -> None:
        """What a listener raises waits until the turn is over: other processes take it, too."""
        if self.deaf is None:
            try:
                self.listener(event)
            except Exception as error:
                self.deaf = error

    def _missed(self, parting: Parting | None) -> str | None:
        if parting is None:
            return None
        before, now = (self._tokenizer.decode(list(ids)) for ids in (parting.before, parting.now))
        return (
            f"parts from an earlier prompt at token {parting.at}, with {now!r} instead of "
            f"{before!r}; {parting.usable} tokens are used again"
        )

    def _settle(self, job: Job) -> Options:
        sampling = job.sampling
        if sampling.top_k >= self._model.view.vocab_size:  # leaves out nothing
            sampling = replace(sampling, top_k=0)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        return replace(
            self._options,
            max_tokens=self._room(job),
            stop_tokens=self._options.stop_tokens if job.stop_tokens is None else job.stop_tokens,
            sampler=sampling.sampler(),
            logits_processors=tuple(sampling.processors()),
            random_state=OwnState(seed),
            guide=self.ticket.guide,
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
            copied=counts.copied,
            peak_memory=mx.get_peak_memory() / 1e9,
        )
        self._tell(Tokens(tuple(_told(tokens, job))))
        stop_at = self._asked.stop_at(self.ticket.stop_at)
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
