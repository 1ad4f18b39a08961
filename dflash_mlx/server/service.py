"""What all APIs share: the loaded model, the engine behind it, the log and the counts."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from dflash_mlx.errors import DFlashError
from dflash_mlx.server.asks import Ask
from dflash_mlx.server.calls import reader
from dflash_mlx.server.channels import Channels
from dflash_mlx.server.exchange import Exchange
from dflash_mlx.server.formats import TEXT, thinking_ends
from dflash_mlx.server.job import Busy, Job, Sampling, TooLong
from dflash_mlx.server.metrics import Counts
from dflash_mlx.server.prompts import Prompt, Prompts
from dflash_mlx.server.refusal import Refusal
from dflash_mlx.server.splitting import MarkerSplitter, Splitter, splitter
from dflash_mlx.server.structured import Grammar

log = logging.getLogger("dflash_mlx.server")


@dataclass(frozen=True)
class Defaults:
    """What holds where a request does not say.

    Attributes:
        sampling: how tokens are drawn.
        max_tokens: the most tokens of an answer; -1 for as many as there are positions.
        verify_length, tree: as in `stream_generate`.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = -1
    verify_length: int | str = "auto"
    tree: int | str = 0


class Service:
    """Answers requests with one loaded pair.

    Attributes:
        engine: runs jobs.
        prompts: makes prompts.
        model, draft: the pair's names.
        defaults: for requests that say less.
        counts: what was done so far.
        idle: seconds without a sign of life after which a stream shows one.
    """

    def __init__(
        self,
        engine: Any,
        prompts: Prompts,
        *,
        model: str,
        draft: str,
        defaults: Defaults | None = None,
        idle: float = 8.0,
    ):
        self.engine, self.prompts = engine, prompts
        self.model, self.draft = model, draft
        self.defaults, self.idle = defaults or Defaults(), idle
        self.counts = Counts()
        self._exchanges: set[Exchange] = set()
        self._rendering = ThreadPoolExecutor(1, "prompts")
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self._closing = False

    async def prompt(self, ask: Ask) -> Prompt:
        """The prompt for what is asked, made off the event loop.

        Raises:
            Refusal: there is nothing to run, the chat template refuses it, or the server goes down.
        """
        self._check_alive()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._rendering, self.prompts.make, ask)

    async def begin(self, ask: Ask, api: str) -> Exchange:
        """Start an answer.

        Raises:
            Refusal: the request cannot be met, or not now.
        """
        prompt = await self.prompt(ask)
        limit = ask.max_tokens or self.defaults.max_tokens
        room = self._room(prompt)
        if room is not None:
            limit = room if limit < 0 else min(limit, room)
        job = Job(
            prompt=tuple(prompt.tokens),
            max_tokens=limit,
            boundaries=prompt.boundaries,
            own=prompt.own,
            sampling=ask.sampling,
            verify_length=self.defaults.verify_length,
            tree=self.defaults.tree,
            grammar=self._grammar(ask, prompt),
            logprobs=ask.logprobs,
            top_logprobs=ask.top_logprobs,
        )
        exchange = self._exchange(ask, prompt)
        exchange.ended = self._ender(exchange, api)
        self._check_alive()
        self._exchanges.add(exchange)
        try:
            if job.grammar is None:
                exchange.submit(self.engine, job)
            else:  # which may take a while to compile
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._compiling, exchange.submit, self.engine, job)
        except DFlashError as error:
            self._exchanges.discard(exchange)
            raise _refusal(error) from error
        self.counts.begun(api)
        return exchange

    def _check_alive(self) -> None:
        if self._closing or not self.engine.alive:
            raise Refusal("The server is going down.", status=503)

    def close(self) -> None:
        """End all answers that are being written, with a word to their readers."""
        self._closing = True
        for exchange in list(self._exchanges):
            exchange.fail(Refusal("The server is going down.", status=503))
        for pool in (self._rendering, self._compiling):
            pool.shutdown(wait=False, cancel_futures=True)

    def metrics(self) -> str:
        """The counts, in Prometheus' text format."""
        engine = self.engine
        gauges = {"active": engine.active, "waiting": engine.waiting, "up": float(engine.alive)}
        return self.counts.text(engine.totals, gauges)

    def _exchange(self, ask: Ask, prompt: Prompt) -> Exchange:
        tokenizer, tools = self.prompts.tokenizer, ask.tools.usable
        channels = Channels(
            tokenizer.detokenizer,
            self._splitter(ask, prompt),
            begun=prompt.begun,
            read_calls=reader(tokenizer, tools) if tools else None,
            stop=ask.stop,
            one_call=not ask.tools.parallel or ask.tools.choice == "named",
        )
        return Exchange(ask, prompt, channels, tokenizer.eos_token_ids, self.idle)

    def _splitter(self, ask: Ask, prompt: Prompt) -> Splitter:
        if ask.messages is None:
            return MarkerSplitter({TEXT: []}, TEXT)
        tools = bool(ask.tools.usable)
        return splitter(self.prompts.tokenizer, prompt.tokens, prompt.state, tools)

    def _grammar(self, ask: Ask, prompt: Prompt) -> Grammar | None:
        """What rules the text, beginning behind the thinking where the prompt begins some."""
        if ask.grammar is None:
            return None
        if ask.tools.usable:
            raise Refusal(
                "A format for the text and tools cannot be had in one request; leave one out.",
                param="tools",
            )
        return ask.grammar.behind(*thinking_ends(self.prompts.tokenizer, prompt.state))

    def _room(self, prompt: Prompt) -> int | None:
        positions = self.engine.positions
        if positions is None:
            return None
        if len(prompt.tokens) >= positions:
            why = f"this model's maximum context length is {positions} tokens."
            raise _too_long(len(prompt.tokens), positions - 1, why)
        return positions - len(prompt.tokens)

    def _ender(self, exchange: Exchange, api: str) -> Callable[[], None]:
        def end() -> None:
            self._exchanges.discard(exchange)
            self.counts.ended(exchange.figures)
            log.info("%s", _line(api, exchange, self.model))

        return end


def _refusal(error: DFlashError) -> Refusal:
    if isinstance(error, TooLong):
        return _too_long(error.prompt_tokens, error.most, str(error))
    if isinstance(error, Busy):
        wait = max(1, round(error.retry_after))
        return Refusal(str(error), status=503, retry_after=wait)
    return Refusal(str(error))


def _too_long(tokens: int, most: int, why: str) -> Refusal:
    # Agents look for these words, in one API or the other, to shorten a conversation.
    return Refusal(
        f"prompt is too long: {tokens} tokens > {most} maximum; {why}",
        param="messages",
        code="context_length_exceeded",
    )


def _line(api: str, exchange: Exchange, model: str) -> str:
    figures, asked = exchange.figures, exchange.ask.model
    parts = [
        f"{figures.generation_tokens} tokens",
        f"{figures.cached}/{figures.prompt_tokens} cached",
        f"first token {figures.first_token_s:.2f} s",
        f"{figures.generation_tps:.0f} tokens/s",
        f"acceptance length {figures.acceptance_length:.2f}",
    ]
    if asked not in (None, model):
        parts.append(f"asked for {asked[:80]!r}")
    if exchange.missed:
        parts.append(exchange.missed)
    return f"{api}: " + ", ".join(parts)
