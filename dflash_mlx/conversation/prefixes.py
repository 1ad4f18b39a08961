"""What earlier prompts left in caches, so that a prompt that begins alike runs only its rest."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dflash_mlx.api import fill_cache
from dflash_mlx.decode import Moment, Options, Prefilled, PromptCache
from dflash_mlx.errors import InvalidCache
from dflash_mlx.pairs import SpeculativeModel

Ids = NDArray[np.int32]


@dataclass(eq=False)
class Entry:
    """One sequence that is kept.

    Attributes:
        cache: of the target and the draft.
        ids: the tokens that it stands for; of a sequence that runs, those of its prompt.
        own: tokens from here on are its last request's own, the template's tail and the answer: a
            later turn of the same conversation may drop or rewrite them.
        moments: where a cache that cannot be cut can go back to, in order.
        running: whether a request uses it now.
        used: when it was used last, as a count of uses.
    """

    cache: PromptCache
    ids: Ids
    own: int
    moments: list[Moment] = field(default_factory=list)
    running: bool = False
    used: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.cache.nbytes + sum(moment.nbytes for moment in self.moments)

    def reach(self, common: int) -> int:
        """How many of the first `common` tokens can be used."""
        last = max((m.count for m in self.moments if m.count <= common), default=0)
        if not self.running:
            return common if common == len(self.ids) or self.cache.holds(common) else last
        # Its caches are ahead of its tokens at times; rows that are there stay as they are.
        if self.cache.keeps_all:
            return max(last, min(common, self.cache.context.offset, len(self.cache.tokens)))
        return last

    def go_back(self, count: int) -> None:
        """Take it to its first `count` tokens, which are within its reach."""
        if count < len(self.ids):
            if self.cache.holds(count):
                self.cache.rewind(count)
            else:
                self.cache.restore(self._moment(count))
        self.moments = [m for m in self.moments if m.count <= count]

    def fork(self, count: int) -> "Entry":
        """Another entry that begins with the same tokens, which are within its reach."""
        other = self._fork(count)
        return Entry(other, self.ids[:count], count, [m for m in self.moments if m.count <= count])

    def _fork(self, count: int) -> PromptCache:
        if any(m.count == count for m in self.moments):
            return self.cache.fork(self._moment(count))
        try:
            return self.cache.fork(self.cache.cut(count))
        except InvalidCache:
            if self.running:
                raise
        other = self.cache.fork(self.cache.moment())
        if count < len(other.tokens):
            other.rewind(count)
        return other

    def _moment(self, count: int) -> Moment:
        return next(m for m in self.moments if m.count == count)

    def remember(self, most: int) -> None:
        """Remember this moment, and of `most` moments the ones that save the most."""
        if not any(m.count == len(self.cache.tokens) for m in self.moments):
            self.moments.append(self.cache.moment())
        while len(self.moments) > most:
            # Without the one that is nearest to its predecessor the fewest tokens are run again.
            counts = [0, *(m.count for m in self.moments[:-1])]
            gaps = [b - a for a, b in pairwise(counts)]
            del self.moments[gaps.index(min(gaps))]


@dataclass(frozen=True)
class Parting:
    """Where a prompt parts from an earlier one that it should have continued.

    Attributes:
        at: tokens that they have in common.
        usable: how many of them could be used.
        before, now: the ids that follow in the earlier prompt and in this one; a few.
    """

    at: int
    usable: int
    before: tuple[int, ...]
    now: tuple[int, ...]


class Lease:
    """A prompt's hold on the cache that serves it; `release` it when its answer is over.

    Attributes:
        cache: stands for the first `cached` tokens of the prompt.
        cached: tokens that need not be run.
        parting: what kept more of an earlier prompt from being used; None where nothing.
    """

    def __init__(
        self,
        prefixes: "PrefixCache",
        entry: Entry,
        prompt: list[int],
        stops: Iterable[int],
        parting: Parting | None,
    ):
        self.cache, self.cached, self.parting = entry.cache, len(entry.cache.tokens), parting
        self.cache.prompt_begin = 0
        self._prefixes, self._entry, self._prompt = prefixes, entry, prompt
        self._stops = sorted({s for s in stops if self.cached < s < len(prompt)})

    def fill(
        self, options: Options, step: Callable[[], int] | None = None
    ) -> Generator[Prefilled, None, None]:
        """Run the prompt, all but its last token, and remember the moments worth it.

        Args:
            options: of the generation that follows.
            step: as for `fill_cache`.
        """
        prefixes, prompt, begin = self._prefixes, self._prompt, self.cached
        total = len(prompt) - begin
        yield Prefilled(0, total)
        for stop in [*self._stops, len(prompt) - 1]:
            if stop > begin:
                part = prompt[begin:stop]
                with closing(fill_cache(prefixes.model, self.cache, part, options, step)) as chunks:
                    for chunk in chunks:
                        if chunk.done:
                            yield Prefilled(begin - self.cached + chunk.done, total)
                begin = stop
            if stop in self._stops and not self.cache.keeps_all:
                self._entry.remember(prefixes.most_moments)

    def release(self) -> None:
        """Keep what the cache stands for now, for later prompts; nothing of a broken one."""
        self._prefixes.keep(self._entry)


class PrefixCache:
    """Sequences that were run, found again by their tokens.

    A prompt takes an entry over when it goes on where that entry's conversation would; when it
    parts earlier, the entry stays as it is and a copy is made, so that conversations that begin
    alike are all kept. Caches that keep every row are cut where two prompts part. The others
    (windows, recurrent state) can only go back to a moment that was remembered: at the boundaries
    that a prompt names, every few thousand tokens, and where an earlier prompt parted.

    Attributes:
        limit: bytes that all entries together may hold.
        evicted: entries that had to go so far.
    """

    stride = 4096  # prompt tokens between two moments
    most_moments = 8  # of an entry

    def __init__(
        self,
        model: SpeculativeModel,
        limit: float = float("inf"),
        most_entries: float = float("inf"),
    ):
        """An empty one; `most_entries` bounds those that nobody uses."""
        self.model, self.limit, self.most_entries = model, limit, most_entries
        self.entries: list[Entry] = []
        self.evicted = 0
        self._uses = 0

    def clear(self) -> None:
        """Forget everything that nobody uses now."""
        self.entries = [e for e in self.entries if e.running]

    @property
    def nbytes(self) -> int:
        """Bytes that all entries hold."""
        return sum(entry.nbytes for entry in self.entries)

    def take(
        self, prompt: Sequence[int], boundaries: Sequence[int] = (), own: int | None = None
    ) -> Lease:
        """A cache for a prompt, standing for as much of it as can be had.

        That is never all of it, since the last token gives the first logits.

        Args:
            prompt: at least one token.
            boundaries: counts of its tokens at which later prompts may part from it.
            own: as `Entry.own`; None: the last boundary.
        """
        ids = np.asarray(prompt, np.int32)
        last = len(ids) - 1
        inner = [b for b in boundaries if 0 < b <= last]
        own = max(inner, default=last) if own is None else own
        found = [(entry, common_prefix(entry.ids, ids[:last])) for entry in self.entries]
        entry, usable = self._nearest(found)
        parting = _parting(found, ids, usable)
        entry.ids, entry.own, entry.running = ids, own, True
        self._use(entry)
        self.entries.append(entry)
        stops = {*(inner or [last]), *range(self.stride, last, self.stride)}
        if parting is not None:
            stops.add(parting.at)
        return Lease(self, entry, list(prompt), stops, parting)

    def _nearest(self, found: list[tuple[Entry, int]]) -> tuple[Entry, int]:
        """An entry that stands at the longest prefix to be had, and that prefix's length.

        Args:
            found: entries, and how many tokens of the prompt they begin with.
        """
        choices = [(entry.reach(common), entry.used, entry, common) for entry, common in found]
        for usable, _, entry, common in sorted(choices, key=lambda c: c[:2], reverse=True):
            if usable == 0:
                break
            try:
                if entry.running or self._branches(entry, common):
                    return entry.fork(usable), usable
                entry.go_back(usable)
            except InvalidCache:
                # Quantized since, so that its moments are of another kind.
                continue
            self.entries.remove(entry)
            return entry, usable
        return Entry(self.model.make_cache(), np.zeros(0, np.int32), 0), 0

    def _branches(self, entry: Entry, common: int) -> bool:
        """Whether a prompt that shares `common` tokens with an entry leaves it to others."""
        parts = common < min(entry.own, len(entry.ids))
        return parts and len(self.entries) < self.most_entries

    def keep(self, entry: Entry) -> None:
        """Take an entry back from the request that used it."""
        self._use(entry)
        entry.running = False
        entry.ids = np.asarray(entry.cache.tokens, np.int32)
        if not entry.cache.valid or not len(entry.ids):
            self.entries.remove(entry)
        self.make_room(0)
        idle = sorted((e for e in self.entries if not e.running), key=lambda e: -e.used)
        for entry in idle[int(min(self.most_entries, len(idle))) :]:
            self.entries.remove(entry)

    def make_room(self, wanted: float) -> bool:
        """Let entries go, the longest unused first, until there is room for so many bytes more.

        Returns:
            Whether there is; entries in use stay.
        """
        held = self.nbytes
        for entry in sorted((e for e in self.entries if not e.running), key=lambda e: e.used):
            if held + wanted <= self.limit:
                break
            held -= entry.nbytes
            self.entries.remove(entry)
            self.evicted += 1
        return held + wanted <= self.limit

    def _use(self, entry: Entry) -> None:
        self._uses += 1
        entry.used = self._uses


def _parting(found: list[tuple[Entry, int]], ids: Ids, usable: int) -> Parting | None:
    """What an earlier prompt has otherwise, where that costs more than its own tail."""
    entry, common = max(found, key=lambda f: f[1], default=(None, 0))
    # One whose prefill was cut short ends before its own tail begins.
    if entry is None or usable >= min(entry.own, len(entry.ids), len(ids) - 1):
        return None
    few = slice(common, common + 12)
    return Parting(common, usable, tuple(entry.ids[few].tolist()), tuple(ids[few].tolist()))


def common_prefix(a: Sequence[int] | Ids, b: Sequence[int] | Ids) -> int:
    """How many tokens two sequences share at their beginning."""
    most = min(len(a), len(b))
    differs = np.asarray(a[:most]) != np.asarray(b[:most])
    return int(differs.argmax()) if differs.any() else most
