"""One request on its way through the engine: submitted, read as pieces, cancelled, counted."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, Protocol

from dflash_mlx.server.asks import Ask
from dflash_mlx.server.channels import Channels, Piece, joined
from dflash_mlx.server.job import (
    EmittedToken,
    Failed,
    Figures,
    Finished,
    Job,
    Started,
    Ticket,
    Tokens,
)
from dflash_mlx.server.prompts import Prompt
from dflash_mlx.server.refusal import Refusal, failed

log = logging.getLogger("dflash_mlx.server")

# Cycles' worth of tokens that may wait for a client that reads slowly.
MOST_WAITING = 8192


class Runs(Protocol):
    """What runs jobs: the engine."""

    def submit(self, job: Job, listener: Callable[[Any], None]) -> Ticket:
        """Put a job in the queue; see `Engine.submit`."""
        ...


class Idle:
    """Nothing has happened for a while; the client should hear that somebody is there."""


class Exchange:
    """A question and its answer, while it is being written.

    Attributes:
        ask: what was asked.
        finish: why the text ended: by itself ("stop"), at a stop string, at the limit ("length"),
            or with calls; None before.
        stopped_by: the stop string.
        missed: why the prefix cache did not help more, in the engine's words.
        figures: what was done up to now.
        ended: called once, when the work is over and the answer read or left.
    """

    def __init__(
        self, ask: Ask, prompt: Prompt, channels: Channels, end_tokens: Iterable[int], idle: float
    ):
        self.ask, self._channels, self._idle = ask, channels, idle
        self._end_tokens = frozenset(end_tokens)
        self._loop = asyncio.get_running_loop()
        self._events: deque[Any] = deque()
        self._news = asyncio.Event()
        self._ticket: Ticket | None = None
        self._begun, self._first, self._cycles = time.perf_counter(), 0.0, 0
        self._tokens: list[EmittedToken] = []
        self._shown: set[int] = set()
        self._over = self._read_by_nobody = self._told = False
        self.finish: Literal["stop", "string", "length", "calls"] | None = None
        self.stopped_by: str | None = None
        self.missed: str | None = None
        self.figures = Figures(prompt_tokens=len(prompt.tokens))
        self.ended: Callable[[], None] = lambda: None

    def submit(self, to: Runs, job: Job) -> None:
        """Hand the work over; raises what the engine's `submit` raises."""
        self._ticket = to.submit(job, self._hear)

    def leave(self) -> None:
        """Read no further; what was run stays in the prefix cache."""
        self._read_by_nobody = True
        if not self._over:
            self._cancel()
        elif not self._told:
            self._told = True
            self.ended()

    def _cancel(self) -> None:
        if self._ticket is not None:
            self._ticket.cancel()

    def fail(self, why: Refusal) -> None:
        """Stop the work, and tell its reader why."""
        self._cancel()
        self._events.clear()
        self._put(why)

    async def pieces(self) -> AsyncGenerator[list[Piece] | Idle, None]:
        """The answer as it comes; `Idle` after every `idle` seconds without.

        Raises:
            Refusal: the work failed.
        """
        spoken = time.monotonic()
        try:
            while True:
                while not self._events:
                    self._news.clear()
                    try:
                        left = spoken + self._idle - time.monotonic()
                        await asyncio.wait_for(self._news.wait(), max(left, 0))
                    except TimeoutError:
                        spoken = time.monotonic()
                        yield Idle()
                event = self._events.popleft()
                try:
                    pieces = self._read(event)
                except Refusal:
                    raise
                except Exception as error:
                    log.exception("Reading an answer failed.")
                    raise failed() from error
                if pieces:
                    spoken = time.monotonic()
                    yield pieces
                if isinstance(event, Finished):
                    break
        finally:
            self.leave()

    @property
    def thinking_tokens(self) -> int:
        """How many tokens of the answer were thinking."""
        return self._channels.thinking_tokens

    def token(self, index: int) -> EmittedToken:
        """A token of the answer, counted from 0."""
        return self._tokens[index]

    def drafted(self, index: int) -> bool:
        """Whether a token of the answer was a proposal of the draft."""
        return index < len(self._tokens) and self._tokens[index].from_draft

    def unseen(self, index: int) -> bool:
        """Whether this is the first time that a token is asked about."""
        fresh = index < len(self._tokens) and index not in self._shown
        self._shown.add(index)
        return fresh

    def shown(self) -> dict[str, Any]:
        """The field `x_dflash` of an answer."""
        figures = self.figures
        return {
            "acceptance_length": round(figures.acceptance_length, 3),
            "verify_length": round(figures.verify_length, 3),
            "plain_share": round(figures.plain_share, 4),
            "tokens_per_second": round(figures.generation_tps, 2),
            "time_to_first_token": round(figures.first_token_s, 4),
            "cached_tokens": figures.cached,
            "target_forwards": figures.target_forwards,
            "draft_tokens": sum(token.from_draft for token in self._tokens),
            "copied_tokens": figures.copied,
            "tokens": figures.generation_tokens,
        }

    def _hear(self, event: Any) -> None:
        """The listener, on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, event)
        except RuntimeError:  # the loop is closed, so nobody reads any more
            self._cancel()

    def _put(self, event: Any) -> None:
        self._events.append(event)
        self._news.set()
        if isinstance(event, Finished | Failed):
            self.figures, self._over = event.figures, True
            if self._read_by_nobody:
                self.leave()
        elif len(self._events) == MOST_WAITING:
            self.fail(Refusal("The answer was not read for too long.", status=408))

    def _read(self, event: Any) -> list[Piece]:
        if isinstance(event, Started):
            self.missed = event.missed
            self.figures = replace(self.figures, cached=event.cached)
        elif isinstance(event, Tokens):
            return self._emitted(event)
        elif isinstance(event, Finished):
            return self._finished(event.reason)
        elif isinstance(event, Failed):
            raise Refusal(event.error, status=500)
        elif isinstance(event, Refusal):
            raise event
        return []

    def _emitted(self, event: Tokens) -> list[Piece]:
        channels = self._channels
        if channels.stopped_at is not None:
            return []
        self._tokens += event.tokens
        self._count()
        text = [token.id for token in event.tokens if token.id not in self._end_tokens]
        pieces = joined(channels.feed(text))
        if channels.stopped_at is not None:
            del self._tokens[channels.stopped_at :]
            if self._ticket is not None:
                self._ticket.stop(at=channels.stopped_at)
        return pieces

    def _count(self) -> None:
        """Figures of an answer that goes on, as its reader sees them."""
        if self._over:
            return
        now = time.perf_counter()
        self._first = self._first or now
        self._cycles += 1
        behind = len(self._tokens) - 1
        self.figures = replace(
            self.figures,
            generation_tokens=len(self._tokens),
            first_token_s=self._first - self._begun,
            generation_tps=behind / (now - self._first) if now > self._first else 0.0,
            acceptance_length=behind / (self._cycles - 1) if self._cycles > 1 else 0.0,
            target_forwards=self._cycles - 1,
        )

    def _finished(self, reason: str) -> list[Piece]:
        channels = self._channels
        if reason == "cancelled":
            raise Refusal("The answer was cancelled.", status=503)
        complete = reason == "stop"
        pieces = channels.finish(complete)
        self.figures = replace(self.figures, generation_tokens=len(self._tokens))
        if channels.stopped_by is not None:
            self.finish, self.stopped_by = "string", channels.stopped_by
        elif channels.called and (complete or channels.stopped_at is not None):
            self.finish = "calls"
        else:
            self.finish = "stop" if complete else "length"
        return pieces
