"""A short rehearsal of the decode loop, to know what cycles cost before the first real one."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing

from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.decode.cost import Costs
from dflash_mlx.decode.loop import Decoder, Options
from dflash_mlx.decode.schedule import Cycle
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.target import TargetView

PROMPT = 64


def measure_costs(view: TargetView, draft: DFlashDraft, seconds: float = 0.8) -> Costs:
    """Time plain cycles and a few verify lengths on a text without meaning.

    A pass over all of them is always finished; passes are repeated until the time is over.
    """
    cache = PromptCache(view.make_cache(), draft.make_context())
    rehearsal = Rehearsal(draft.most_proposals, seconds)
    # Scattered ids, so that a mixture of experts does not see the same ones each time.
    prompt = [(i + 1) * 7919 % view.vocab_size for i in range(PROMPT)]
    options = Options(max_tokens=-1)
    decoder = Decoder(view, draft, cache, rehearsal, options, drafting=True, keep_cache=False)
    with closing(decoder.run(prompt)) as tokens:
        for _ in tokens:
            if rehearsal.finished:
                break
    return rehearsal.costs()


class Rehearsal:
    """A verify-length strategy that goes through all kinds of cycles and notes their times."""

    learns = True

    def __init__(self, most: int, seconds: float):
        self.most = most
        self.finished = False
        self.lengths = sorted({most, 1, *(m for m in (2, 3, 5, 7, 11) if m < most)}, reverse=True)
        # The first cycle after a change of kind is not timed, so the longest length comes twice.
        lengths = [most, *self.lengths]
        self._pass = [(None, False)] * 5 + [(m, False) for m in lengths] + [(most, True)]
        self._steps: list[tuple[int | None, bool]] = []
        self._now: tuple[int | None, bool] = (None, False)
        self._seconds = seconds
        self._started: float | None = None
        self._passes = 0
        self._samples: dict[tuple[int | None, bool], list[float]] = defaultdict(list)
        self._first: dict[tuple[int | None, bool], list[float]] = {}

    def choose(self, most: int, context: int, narrows: bool = True) -> int:
        if self._started is None:
            self._started = time.perf_counter()
        if not self._steps:
            late = time.perf_counter() - self._started > self._seconds
            self.finished = late and self._passes > 0
            self._steps = list(self._pass)
            if self._passes == 1:
                # What was timed so far includes compiling.
                self._first, self._samples = self._samples, defaultdict(list)
            self._passes += 1
        self._now = self._steps.pop(0)
        return self._now[0] or 0

    def narrow(self, read: Callable[[], Sequence[float]]) -> int:
        length, reads = self._now
        if reads:
            read()
        return length or 0

    def observe(self, cycle: Cycle) -> None:
        if cycle.seconds is not None and not cycle.after_draft and not cycle.after_plain:
            self._samples[cycle.verified, cycle.read].append(cycle.seconds)

    def finish(self) -> None:
        pass

    def costs(self) -> Costs:
        """What was found; lengths in between lie on straight lines."""
        usual = {
            # Noise only ever adds time.
            kind: sorted(seconds)[len(seconds) // 4]
            for kind, seconds in {**self._first, **self._samples}.items()
        }
        known = {m: usual[m, False] for m in self.lengths if (m, False) in usual}
        cycle = [_between(known, m) for m in range(self.most + 1)]
        longest = self.most
        reading = max(usual.get((longest, True), 0.0) - cycle[longest], 0.0)
        return Costs(usual[None, False], tuple(cycle), reading).smoothed()


def _between(known: dict[int, float], m: int) -> float:
    below = max((k for k in known if k <= m), default=min(known))
    above = min((k for k in known if k >= m), default=max(known))
    if below == above or below > m:
        return known[above]
    share = (m - below) / (above - below)
    return known[below] + share * (known[above] - known[below])
