"""One thread that holds the model and runs requests, several at once, by turns."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.conversation.positions import max_positions
from dflash_mlx.conversation.prefixes import PrefixCache
from dflash_mlx.decode import Options
from dflash_mlx.errors import DFlashError
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.server.job import Busy, Failed, Figures, Finished, Job, Ticket, TooLong
from dflash_mlx.server.memory import Memory, OutOfMemory
from dflash_mlx.server.orders import Alone, Leading, Orders
from dflash_mlx.server.scheduler import Scheduler
from dflash_mlx.server.structured import Grammars
from dflash_mlx.server.turns import Listener, Sequence

log = logging.getLogger(__name__)

Loader = Callable[[], tuple[SpeculativeModel, TokenizerWrapper]]


@dataclass
class Totals:
    """Counts since the engine started; what `/metrics` reports."""

    submitted: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    target_forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    copied: int = 0
    cache_bytes: int = 0
    cache_entries: int = 0
    evicted: int = 0

    def note(self, prefixes: PrefixCache) -> None:
        """Take down what the prefix cache holds."""
        self.cache_bytes, self.cache_entries = prefixes.nbytes, len(prefixes.entries)
        self.evicted = prefixes.evicted

    def count(self, event: Finished | Failed) -> None:
        """Count a request that ended."""
        if isinstance(event, Failed):
            self.failed += 1
        elif event.reason == "cancelled":
            self.cancelled += 1
        else:
            self.finished += 1
        figures = event.figures
        self.prompt_tokens += figures.prompt_tokens
        self.cached_tokens += figures.cached
        self.generation_tokens += figures.generation_tokens
        self.target_forwards += figures.target_forwards
        self.proposed += figures.proposed
        self.accepted += figures.accepted
        self.copied += figures.copied


@dataclass
class _Waiting:
    ticket: Ticket
    listener: Listener
    submitted: float

    @property
    def figures(self) -> Figures:
        queued = time.perf_counter() - self.submitted
        return Figures(prompt_tokens=len(self.ticket.job.prompt), queued_s=queued)


class Engine:
    """Runs jobs on one model; every MLX operation happens on the engine's own thread.

    Listeners are called on that thread, in order: Started, Prefilled for every chunk, Tokens for
    every cycle, and Finished or Failed once, last. They should be quick; one that raises ends its
    own request.

    Attributes:
        model, tokenizer: the pair and its tokenizer, once started.
        totals: counts since the start.
        alive: whether the thread runs; a failed request does not end it.
    """

    def __init__(
        self,
        load: Loader,
        *,
        cache_bytes: int,
        max_active: int = 4,
        max_waiting: int = 64,
        options: Options | None = None,
        lost: Callable[[Exception], None] | None = None,
    ):
        """Prepare; `start` loads.

        Args:
            load: gives the pair and its tokenizer; called on the engine's thread.
            cache_bytes: what all caches together may hold.
            max_active: sequences that take turns.
            max_waiting: requests that may wait for a place.
            options: of every generation: the target cache's quantization, the largest chunk.
            lost: called where one of several processes cannot go on, so that none can.
        """
        self.totals = Totals()
        self.alive = False
        self.cache_bytes, self.max_active, self.max_waiting = cache_bytes, max_active, max_waiting
        self._load, self._options, self._lost = load, options or Options(), lost
        self._orders: Orders = Alone()
        self._scheduler = Scheduler(self._options.prefill_step_size)
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._usual_seconds = 1.0  # that a request takes
        self._thread = threading.Thread(target=self._work, name="dflash-engine", daemon=True)
        self._ready = threading.Event()
        self._problem: BaseException | None = None

    def start(self) -> None:
        """Load the model; raises what loading raised."""
        self._thread.start()
        self._ready.wait()
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def active(self) -> int:
        """Sequences that take turns now."""
        return len(self._scheduler.sequences)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @property
    def positions(self) -> int | None:
        """How many tokens prompt and answer may have together; None where the model has no say."""
        return max_positions(self.model.target)

    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Put a job in the queue.

        Raises:
            TooLong: the prompt leaves no position to write at, or its caches cannot fit.
            Busy: the queue is full.
            DFlashError: something in the job cannot be meant, or the engine has ended.
        """
        self._check(job)
        guide = None if job.grammar is None else self._grammars.guide(job.grammar)
        ticket = Ticket(job, self._wake, guide)
        with self._changed:
            if self._closing or not self.alive:
                raise DFlashError("The engine has ended; start the server again.")
            if len(self._waiting) >= self.max_waiting:
                self.totals.refused += 1
                raise Busy(self._retry_after())
            self.totals.submitted += 1
            self._waiting.append(_Waiting(ticket, listener, time.perf_counter()))
            self._changed.notify()
        return ticket

    def _check(self, job: Job) -> None:
        if not job.prompt:
            raise DFlashError("The prompt is empty; give at least one token.")
        if job.max_tokens == 0 or job.max_tokens < -1:
            raise DFlashError(
                f"max_tokens is {job.max_tokens}; give at least 1, or -1 for no limit."
            )
        # Out of the embedding's range MLX reads whatever memory is there.
        vocabulary = self.model.view.vocab_size
        ids = (*job.prompt, *(token for token, _ in job.sampling.logit_bias))
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise DFlashError(f"Token ids go from 0 to {vocabulary - 1} for this model.")
        length, most = len(job.prompt), self.positions
        if most is not None and length >= most:
            raise TooLong(
                f"The prompt has {length} tokens and this model only {most} positions; shorten it.",
                length,
                most,
            )
        self._memory.check(job)

    def _retry_after(self) -> int:
        """Seconds until the queue has likely moved on by one place."""
        return min(max(round(self._usual_seconds / self.max_active), 1), 60)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            # Streams that outlive their thread abort the process when it exits (MLX 0.32.4, CPU).
            mx.clear_streams()

    def _serve(self) -> None:
        try:
            self.model, self.tokenizer = self._load()
            if self.model.ranks is not None:
                self._orders = Leading(self.model.ranks)
            self._orders.open(self.cache_bytes)
            self._memory = Memory(self.model, self._options, self.cache_bytes)
            self._grammars = Grammars(self.tokenizer, self.model.view.vocab_size)
            self.alive = True
        except BaseException as error:
            self._problem = error
            return
        finally:
            self._ready.set()
        try:
            with wired_limit(self.model.target, [cast(mx.Stream, generation_stream)]):
                while self._admit():
                    if self._scheduler.sequences:
                        self._turn()
                    else:
                        self._orders.rest()
        except Exception as error:
            if self._lost is not None:
                self._lost(error)
            raise
        finally:
            self.alive = False
            self._end_all()
            self._orders.close()

    def _admit(self) -> bool:
        """Give places to who waits, and wait while nobody is there; False: the engine closes."""
        with self._changed:
            while True:
                if self._closing:
                    return False
                gone = [w for w in self._waiting if w.ticket.cancelled]
                for waiting in gone:
                    self._waiting.remove(waiting)
                while self._waiting and self._has_place(self._waiting[0].ticket.job):
                    waiting = self._waiting.popleft()
                    self._scheduler.add(self._begin(waiting))
                if gone or self._scheduler.sequences:
                    break
                mx.clear_cache()
                if not self._changed.wait(self._orders.pause):
                    break
        for waiting in gone:
            self._turn_away(waiting)
        return True

    def _turn_away(self, waiting: _Waiting) -> None:
        self.totals.cancelled += 1
        self._tell(waiting.listener, Finished("cancelled", waiting.figures))

    def _has_place(self, job: Job) -> bool:
        running = [s.ticket.job for s in self._scheduler.sequences]
        return not running or (len(running) < self.max_active and self._memory.fits(job, running))

    def _begin(self, waiting: _Waiting) -> Sequence:
        waiting.ticket.job = self._orders.begin(waiting.ticket.job)
        return Sequence(
            self._memory,
            self.tokenizer,
            waiting.ticket,
            waiting.listener,
            waiting.submitted,
            self._options,
            self._scheduler.chunk,
            self._orders,
        )

    def _turn(self) -> None:
        """One turn of whoever is next; what breaks it ends it alone."""
        sequence = self._scheduler.next()
        if sequence.ticket.cancelled:
            self._end(sequence, Finished("cancelled", sequence.figures))
            return
        self._orders.turn(self._scheduler.sequences.index(sequence))
        try:
            more = self._scheduler.run(sequence)
        except Exception as error:
            if not self._orders.ends_alone(error):
                raise
            self._end(sequence, Failed(sentence(error), sequence.figures))
        else:
            if more and sequence.has_grown():
                self._check_memory()
            if sequence.deaf is not None and sequence in self._scheduler.sequences:
                self._end(sequence, Failed(sentence(sequence.deaf), sequence.figures))
            elif not more:
                self._end(sequence, None)

    def _check_memory(self) -> None:
        """Where what runs has outgrown the bound, the latest comer ends."""
        try:
            self._memory.check_running()
        except OutOfMemory as error:
            latest = self._scheduler.sequences[-1]
            self._end(latest, Failed(str(error), latest.figures))

    def _end(self, sequence: Sequence, event: Finished | Failed | None) -> None:
        """Take a sequence's place away and tell its owner the last it will hear."""
        self._orders.end(self._scheduler.sequences.index(sequence))
        self._scheduler.remove(sequence)
        try:
            sequence.close()
        except Exception as error:
            if not self._orders.ends_alone(error):
                raise
            event = Failed(sentence(error), sequence.figures)
        if event is None:
            event = sequence.ending or Finished("cancelled", sequence.figures)
            seconds = time.perf_counter() - sequence.submitted - sequence.figures.queued_s
            self._usual_seconds += 0.2 * (seconds - self._usual_seconds)
        self.totals.count(event)
        self.totals.note(self._memory.prefixes)
        self._tell(sequence.listener, event)

    def _end_all(self) -> None:
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        for sequence in list(self._scheduler.sequences):
            self._end(sequence, Finished("cancelled", sequence.figures))
        for one in waiting:
            self._turn_away(one)

    def _tell(self, listener: Listener, event: Finished | Failed) -> None:
        try:
            listener(event)
        except Exception:
            log.exception("A listener failed on the last event of its request.")


def sentence(error: Exception) -> str:
    """What went wrong, for somebody who sent a request: no path of the code, no traceback."""
    if isinstance(error, DFlashError):
        return str(error)
    if isinstance(error, MemoryError) or "malloc" in str(error):
        return "The machine ran out of memory while it answered this request; send a shorter one."
    log.exception("A request failed.", exc_info=error)
    return f"Answering this request failed unexpectedly ({type(error).__name__}); see the log."
