"""Keeping all caches together within their bound."""

from collections.abc import Iterable

from dflash_mlx.api import make_decoder
from dflash_mlx.conversation.footprint import Footprint
from dflash_mlx.conversation.prefixes import PrefixCache
from dflash_mlx.decode import Options
from dflash_mlx.errors import DFlashError
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.server.job import Job, TooLong


class OutOfMemory(DFlashError):
    """A request that outgrew the bound while it ran."""


class Memory:
    """Reckons before a request runs what it will hold, and measures while it does.

    Attributes:
        prefixes: all sequences, running or kept.
        limit: bytes that they may hold together.
    """

    answer = 1024  # tokens of an answer that room is kept for; few are longer

    def __init__(self, model: SpeculativeModel, options: Options, limit: int):
        """Runs the pair for a few tokens, to see what they leave behind."""
        self.prefixes, self.limit = PrefixCache(model, limit), limit
        cache = model.make_cache()
        decoder = make_decoder(model, cache, options, None)
        with_tokens = decoder.run([0, 1])
        for _ in range(2):
            next(with_tokens)
        with_tokens.close()
        self._footprint = Footprint(cache)

    def check(self, job: Job) -> None:
        """Raise TooLong for a prompt that would not fit if nothing else were there."""
        tokens = len(job.prompt)
        needed = self._footprint.nbytes(tokens + 1)
        if needed > self.limit:
            per_token = self._footprint.nbytes(tokens + 1) / tokens
            raise TooLong(
                f"The prompt has {tokens} tokens, whose caches take {_mb(needed)}, and all caches "
                f"together may hold {_mb(self.limit)}; shorten it or raise --cache-bytes.",
                tokens,
                int(self.limit / per_token),
            )

    def needed(self, job: Job) -> int:
        """Bytes that a request will likely hold."""
        answer = self.answer if job.max_tokens < 0 else min(job.max_tokens, self.answer)
        return self._footprint.nbytes(len(job.prompt) + answer)

    def fits(self, job: Job, running: Iterable[Job]) -> bool:
        """Whether a request has room beside those that run."""
        return self.needed(job) + sum(map(self.needed, running)) <= self.limit

    def make_room(self, job: Job, held: int) -> None:
        """Let kept prefixes go until a request, which holds so much already, finds room."""
        self.prefixes.make_room(max(self.needed(job) - held, 0))

    def check_running(self) -> None:
        """Raise OutOfMemory where what runs has outgrown the bound, every kept prefix gone."""
        if not self.prefixes.make_room(0):
            raise OutOfMemory(
                f"The caches of what runs now have outgrown the {_mb(self.limit)} that they may "
                "hold; ask for a shorter answer or raise --cache-bytes."
            )


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
