"""Driving the engine as a server does: jobs in, events out."""

import queue
from typing import Any

from dflash_mlx.server.engine import Engine
from dflash_mlx.server.job import Failed, Finished, Job, Started, Ticket, Tokens

LIMIT = 120  # seconds until a test gives up on an event


class Client:
    """One request and the events that came of it."""

    def __init__(self, engine: Engine, job: Job):
        self.events: queue.Queue[Any] = queue.Queue()
        self.ids: list[int] = []
        self.started: Started | None = None
        self.ticket: Ticket = engine.submit(job, self.events.put)

    def wait_for(self, *kinds: type) -> Any:
        """The next event of these kinds; the others are taken in."""
        while True:
            event = self.events.get(timeout=LIMIT)
            if isinstance(event, Tokens):
                self.ids += [token.id for token in event.tokens]
            if isinstance(event, Started):
                self.started = event
            if isinstance(event, kinds):
                return event

    def end(self) -> Finished | Failed:
        """Wait until it is over."""
        return self.wait_for(Finished, Failed)


def answer(engine: Engine, job: Job) -> list[int]:
    """The tokens of a request that has to end well."""
    client = Client(engine, job)
    event = client.end()
    assert isinstance(event, Finished), event
    return client.ids
