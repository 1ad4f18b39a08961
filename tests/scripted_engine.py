"""An engine without a model: it says what it is told to, at the pace asked for."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dflash_mlx.server.job import (
    Busy,
    EmittedToken,
    Failed,
    Figures,
    Finished,
    Job,
    Started,
    Ticket,
    Tokens,
)


@dataclass
class Totals:
    submitted: int = 0


@dataclass
class ScriptedEngine:
    """Answers every job with the same tokens.

    Attributes:
        says: the answer's token ids, without an end token.
        end: the end token, emitted where the job's limit allows it.
        cycle: tokens per event.
        pause: seconds before each event.
        fails: the error that the answer ends with.
        busy: refuse everything.
        jobs, tickets: what was submitted.
    """

    says: Sequence[int]
    end: int | None = None
    cycle: int = 3
    pause: float = 0.0
    fails: str = ""
    busy: bool = False
    positions: int | None = None
    alive: bool = True
    active: int = 0
    waiting: int = 0
    totals: Totals = field(default_factory=Totals)
    jobs: list[Job] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    last: threading.Event = field(default_factory=threading.Event)

    def submit(self, job: Job, listener: Callable[[Any], None]) -> Ticket:
        if self.busy:
            raise Busy(7)
        self.jobs.append(job)
        ticket = Ticket(job, lambda: None)
        self.tickets.append(ticket)
        self.last.clear()
        threading.Thread(target=self._answer, args=(job, ticket, listener), daemon=True).start()
        return ticket

    def _answer(self, job: Job, ticket: Ticket, listener: Callable[[Any], None]) -> None:
        listener(Started(len(job.prompt) // 2))
        tokens = [*self.says, *([] if self.end is None else [self.end])]
        reason = "stop" if len(tokens) <= job.max_tokens or job.max_tokens < 0 else "length"
        tokens = tokens if reason == "stop" else tokens[: job.max_tokens]
        emitted = 0
        for cycle in _cycles(tokens, self.cycle):
            time.sleep(self.pause)
            if ticket.cancelled or ticket.stop_at is not None:
                reason = "cancelled" if ticket.cancelled else "stop"
                break
            emitted += len(cycle)
            told = [
                EmittedToken(
                    id,
                    i < len(cycle) - 1,
                    -0.5 if job.logprobs else None,
                    tuple((id + n, -0.5 - n) for n in range(job.top_logprobs)),
                )
                for i, id in enumerate(cycle)
            ]
            listener(Tokens(tuple(told)))
        figures = Figures(
            prompt_tokens=len(job.prompt),
            cached=len(job.prompt) // 2,
            generation_tokens=emitted,
            first_token_s=0.1,
            generation_tps=100.0,
            acceptance_length=float(self.cycle),
            verify_length=4.0,
        )
        listener(Failed(self.fails, figures) if self.fails else Finished(reason, figures))
        self.last.set()


def _cycles(tokens: Sequence[int], length: int) -> Iterable[Sequence[int]]:
    return [tokens[i : i + length] for i in range(0, len(tokens), length)]
