"""What the engine does that others have to do with it, where several processes run one model.

The engine of rank 0 decides: which request begins, whose turn it is, how long a prefill chunk is,
where a text ends. It says so before it does it, and the other ranks do the same (`following.py`).
"""

import json
import secrets
from dataclasses import asdict, replace
from typing import Any, Protocol

from dflash_mlx.distributed import Ranks
from dflash_mlx.errors import DFlashError
from dflash_mlx.server.job import Job, Sampling
from dflash_mlx.server.structured import Grammar

BEGIN, TURN, END, REST, CLOSE = range(5)
PAUSE = 0.1  # seconds between two signs of life of an engine that has nothing to do


class Turns(Protocol):
    """What a request asks while it runs, in every rank."""

    def chunk(self, tokens: int) -> int:
        """The most tokens of the prefill chunk that is about to run."""
        ...

    def stop_at(self, tokens: int | None) -> int | None:
        """Behind how many tokens the text ends, if its owner knows by now."""
        ...

    def cached(self, tokens: int) -> None:
        """So many tokens of the prompt need not be run."""
        ...


class Orders(Turns, Protocol):
    """What the engine says before it does it.

    Attributes:
        pause: seconds that the engine may do nothing before it calls `rest`; None: any time.
    """

    pause: float | None

    def open(self, cache_bytes: int) -> None:
        """The engine begins; its caches may hold so many bytes."""
        ...

    def begin(self, job: Job) -> Job:
        """A request gets a place behind the others; returns it as all run it."""
        ...

    def turn(self, place: int) -> None:
        """The request at this place has a turn."""
        ...

    def end(self, place: int) -> None:
        """The request at this place loses it."""
        ...

    def rest(self) -> None:
        """There is nothing to do."""
        ...

    def close(self) -> None:
        """The engine ends."""
        ...

    def ends_alone(self, error: Exception) -> bool:
        """Whether an error of a request's turn ends this request, and no more than it."""
        ...


class Alone:
    """There is one process."""

    pause: float | None = None

    def chunk(self, tokens: int) -> int:
        return tokens

    def stop_at(self, tokens: int | None) -> int | None:
        return tokens

    def cached(self, tokens: int) -> None:
        pass

    def open(self, cache_bytes: int) -> None:
        pass

    def begin(self, job: Job) -> Job:
        return job

    def turn(self, place: int) -> None:
        pass

    def end(self, place: int) -> None:
        pass

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass

    def ends_alone(self, error: Exception) -> bool:
        return True


class SharedTurns:
    """Rank 0's answers in every rank."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks

    def chunk(self, tokens: int) -> int:
        return self._ranks.told([tokens])[0]

    def stop_at(self, tokens: int | None) -> int | None:
        told = self._ranks.told([0 if tokens is None else tokens + 1])[0]
        return told - 1 if told else None

    def cached(self, tokens: int) -> None:
        """Ranks that came to different caches can only end: they would run different prompts."""
        if self._ranks.told([tokens])[0] != tokens:
            raise RuntimeError(f"[distributed] rank {self._ranks.rank} has {tokens} tokens cached")


class Leading(SharedTurns):
    """Rank 0's, which tells the others."""

    pause: float | None = PAUSE

    def open(self, cache_bytes: int) -> None:
        self._ranks.decided(lambda: cache_bytes)

    def begin(self, job: Job) -> Job:
        sampling = job.sampling
        if sampling.seed is None:
            job = replace(job, sampling=replace(sampling, seed=secrets.randbits(64)))
        self._say(BEGIN)
        self._ranks.told_text(to_text(job))
        return job

    def turn(self, place: int) -> None:
        self._say(TURN, place)

    def end(self, place: int) -> None:
        self._say(END, place)

    def rest(self) -> None:
        self._say(REST)

    def close(self) -> None:
        self._say(CLOSE)

    def ends_alone(self, error: Exception) -> bool:
        # What is wrong with a request is found in all ranks at the same place. Whatever else breaks
        # a turn may have broken it in one.
        return isinstance(error, DFlashError)

    def _say(self, order: int, place: int = 0) -> None:
        self._ranks.told([order, place])


def to_text(job: Job) -> str:
    """A job as JSON, for the other ranks."""
    about = asdict(job)
    if job.stop_tokens is not None:
        about["stop_tokens"] = sorted(job.stop_tokens)
    return json.dumps(about)


def from_text(text: str) -> Job:
    """The job that `to_text` was given."""
    about: dict[str, Any] = json.loads(text)
    sampling, grammar = about["sampling"], about["grammar"]
    sampling["xtc_special_tokens"] = tuple(sampling["xtc_special_tokens"])
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    about["sampling"] = Sampling(**sampling)
    if grammar is not None:
        about["grammar"] = Grammar(**{**grammar, "after": tuple(map(tuple, grammar["after"]))})
    if about["stop_tokens"] is not None:
        about["stop_tokens"] = frozenset(about["stop_tokens"])
    return Job(
        **{**about, "prompt": tuple(about["prompt"]), "boundaries": tuple(about["boundaries"])}
    )
