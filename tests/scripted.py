"""A target, a draft, a machine and a clock by script, around the real decode loop.

A machine is what its cycles cost; a text is what the draft would guess right. Time is counted in
plain steps and passes twice: as the policy is shown it, with noise and load, and as it would pass
on a quiet machine, which is what a policy is judged by.
"""

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dflash_mlx.decode import Decoder, Options, PromptCache
from dflash_mlx.decode.clock import CycleClock
from dflash_mlx.draft import Context, Proposals
from dflash_mlx.policy import Cycle, FixedLength, Lap, Policy, Sign
from dflash_mlx.propose import Lattice, Tree

UNIT = 0.03  # seconds of a plain step, as they are shown
HOST = 0.04  # plain steps between a verdict and the next forward
READING = 0.03  # plain steps that reading confidences keeps the host
GROWING = 0.06  # plain steps that reading candidates and growing a tree do
RIGHT, WRONG = 1, 0  # the target's token, where no tokens are given, and one that it never is
WIDTH = 4  # candidates of a position


@dataclass(frozen=True, eq=False)
class Machine:
    """Costs in plain steps at a short context.

    Attributes:
        rows: a verify by its rows; between those given it lies on straight lines.
        draft: a draft's forward.
        per_row: what 1,000 tokens of context add to every row of a forward, the draft's included.
    """

    name: str
    rows: dict[int, float]
    draft: float
    per_row: float = 0.0

    def verify(self, rows: int, context: int) -> float:
        known = sorted(self.rows)
        right = min(max(bisect_left(known, rows), 1), len(known) - 1)
        a, b = known[right - 1], known[right]
        curve = self.rows[a] + (self.rows[b] - self.rows[a]) * (rows - a) / (b - a)
        return curve + rows * self.per_row * context / 1000

    def propose(self, block: int, context: int) -> float:
        return self.draft * (1 + block * self.per_row * context / 1000)


def scaled(milliseconds: dict[int, float]) -> dict[int, float]:
    return {rows: ms / milliseconds[1] for rows, ms in milliseconds.items()}


# From the M5 Max on others' measurements, or between the bounds that they gave.
MACHINES = {
    m.name: m
    for m in (
        Machine("flat", {1: 1.0, 16: 1.0}, 0.15),
        Machine("gentle slope", {1: 1.0, 16: 1.9}, 0.2),
        Machine("cliff at 5 rows", {1: 1.0, 4: 1.1, 5: 1.9, 8: 2.2, 16: 3.2}, 0.12),
        Machine("cliff at 9 rows", {1: 1.0, 8: 1.25, 9: 2.4, 16: 3.0}, 0.15),
        Machine("hopeless", {1: 1.0, 16: 12.0}, 1.0),
        Machine("M5 Max 4-bit", scaled({1: 76, 3: 85, 5: 108, 8: 168, 12: 242, 16: 296}), 0.08),
        Machine("M4 Pro 4-bit", {1: 1.0, 2: 1.14, 3: 1.36, 4: 1.4, 6: 1.8, 8: 2.2, 16: 4.4}, 0.15),
        Machine("M3 Ultra 4-bit", {1: 1.0, 2: 1.8, 4: 3.3, 8: 6.1, 16: 6.3}, 0.12),
        Machine("M3 Ultra bf16", {1: 1.0, 2: 2.0, 16: 2.0}, 0.12),
        Machine("mixture of experts", {1: 1.0, 2: 1.5, 4: 2.2, 8: 3.2, 16: 4.6}, 0.2),
        Machine("2-core CPU", scaled({1: 7.8, 4: 10.5, 8: 13.2, 16: 20.0}), 0.33),
        Machine("growing with context", {1: 1.0, 16: 1.9}, 0.2, per_row=0.02),
    )
}


class Text:
    """Which tokens a draft would guess, fixed for a seed, whatever is drafted and verified.

    Each token has a chance of its own around its passage's, and a draw that decides. Deeper
    proposals are a little worse. The confidence is a distorted, noisy view of the chance. Where the
    first guess is wrong, the second has half its chance, the third a quarter.
    """

    def __init__(self, passages: Sequence[tuple[int, float]], length: int, seed: object):
        rng = random.Random(f"text {passages} {seed}")
        self.length = length
        self.chances: list[float] = []
        while len(self.chances) < length + 32:
            for tokens, mean in passages:
                certain = mean in (0.0, 1.0)
                self.chances += [
                    mean if certain else rng.betavariate(1.5 * mean, 1.5 * (1 - mean))
                    for _ in range(tokens)
                ]
        self.draws = [rng.random() for _ in self.chances]
        self.blur = [rng.gauss(0, 0.1) for _ in self.chances]

    def right(self, position: int, depth: int) -> bool:
        return self.draws[position] < self.chances[position] * 0.985**depth

    def rank(self, position: int, depth: int) -> int:
        """Which of the draft's candidates is right; WIDTH if none is."""
        first = self.chances[position] * 0.985**depth
        if self.draws[position] < first:
            return 0
        left = (self.draws[position] - first) / (1 - first)
        return next((r for r in range(1, WIDTH) if left < first * (1 - 0.5**r)), WIDTH)

    def confidence(self, position: int, depth: int) -> float:
        chance = self.chances[position] * 0.985**depth
        return min(max(chance**0.7 + self.blur[position], 0.001), 0.999)


TEXTS = {
    "good": [(1000, 0.93)],
    "fair": [(1000, 0.6)],
    "poor": [(1000, 0.35)],
    "hopeless": [(1000, 0.0)],
    "switching": [(250, 0.93), (250, 0.3)],
    "short turns": [(120, 0.95), (120, 0.15)],
}


@dataclass(frozen=True)
class Noise:
    """What is wrong with the times that a policy is shown.

    Attributes:
        spread: of the log of every time.
        spikes: the share of cycles that take 2 to 5 times as long.
        load: how much slower everything is, by the seconds shown so far.
    """

    spread: float = 0.02
    spikes: float = 0.0
    load: Callable[[float], float] = lambda seconds: 1.0


NOISES = {
    "quiet": Noise(),
    "noise of 10 %": Noise(0.1),
    "noise of 30 %": Noise(0.3),
    "spikes": Noise(0.05, 0.05),
    "load that comes and goes": Noise(0.1, load=lambda t: 1.0 + int(t / 10) % 2),
    "load at the start": Noise(0.05, load=lambda t: 2.5 if t < 8 else 1.0),
}


class Device:
    """Runs forwards one after the other, and the host that waits for it."""

    def __init__(self) -> None:
        self.now = self.free = 0.0

    def run(self, cost: float) -> float:
        self.free = max(self.free, self.now) + cost
        return self.free


class Run:
    """One generation: the parts that the loop is given, and what came of it.

    With `tokens`, a prompt and an answer of which none is WRONG, the target says these, whatever
    is proposed, and they may be copied.

    Attributes:
        cycles: what the policy was told of.
        seconds: its true time from the first token on, in plain steps.
    """

    def __init__(
        self,
        policy: Policy,
        machine: Machine,
        text: Text,
        block: int = 8,
        noise: Noise = NOISES["quiet"],
        seed: object = 0,
        prompt: int = 1,
        start: float = 0.0,
        confident: bool = True,
        tokens: Sequence[int] = (),
        copies: bool = True,
    ):
        self.machine, self.text, self.block, self.prompt = machine, text, block, prompt
        self.noise, self.random, self.confident = noise, random.Random(f"noise {seed}"), confident
        self.policy, self.cycles = policy, list[Cycle]()
        self.shown, self.true, self.factor = Device(), Device(), 1.0
        self.shown.now = start
        self.waiting: deque[tuple[float, float]] = deque()
        self.drafted = (0.0, 0.0)
        self.rows = 0
        self.tokens = [*tokens] or [RIGHT] * (prompt + text.length)
        # What a draft may propose behind the end, and a verify look at.
        self.tokens += [RIGHT] * 64
        self.vocabulary = mx.arange(max(*self.tokens, RIGHT + WIDTH) + 1)
        draft: Any = ScriptedDraft(self)
        view: Any = ScriptedTarget(self)
        self.decoder = Decoder(
            view,
            draft,
            PromptCache([], Context([])),
            Watched(self),
            Options(max_tokens=text.length, copies=copies and bool(tokens)),
            drafting=True,
            keep_cache=False,
            clock=ScriptedClock(self),
        )
        first = None
        for i, token in enumerate(self.decoder.run(self.tokens[:prompt])):
            assert token.id == self.tokens[prompt + i]
            first = self.true.now if first is None else first
        self.seconds = self.true.now - (first or 0.0)

    def logits(self, rows: int) -> mx.array:
        """The target's rows behind what its cache holds."""
        right = mx.array(self.tokens[self.rows + 1 : self.rows + 1 + rows])
        return (right[None, :, None] == self.vocabulary).astype(mx.float32)

    @property
    def plain_share(self) -> float:
        return self.decoder.statistics.plain_share

    @property
    def lengths(self) -> list[int]:
        """Proposals verified, cycle by cycle; -1 for a plain one."""
        return [c.verified if c.drafted else -1 for c in self.cycles]

    def begin_cycle(self) -> None:
        factor = self.random.lognormvariate(0, self.noise.spread)
        if self.random.random() < self.noise.spikes:
            factor *= self.random.uniform(2, 5)
        self.factor = UNIT * factor * self.noise.load(self.shown.now)

    def forward(self, cost: float) -> tuple[float, float]:
        return self.shown.run(cost * self.factor), self.true.run(cost)

    def wait(self, done: tuple[float, float], host: float) -> None:
        self.shown.now = max(self.shown.now, done[0]) + host * UNIT
        self.true.now = max(self.true.now, done[1]) + host


class ScriptedClock(CycleClock):
    def __init__(self, run: Run):
        super().__init__(lambda: run.shown.now)
        self._run = run

    def lap(self, drafted: bool, followed: bool = False, copied: bool = False) -> Lap:
        done = self._run.waiting.popleft()
        self._run.wait(done, 0.0)
        lap = super().lap(drafted, followed, copied)
        self._run.wait(done, HOST)
        return lap


class Watched:
    """A policy, seen by the script: it passes everything on."""

    learns = True

    def __init__(self, run: Run):
        self._run = run

    def copy(self, chances: Sequence[float], context: int) -> int:
        count = self._run.policy.copy(chances, context)
        assert 0 <= count <= len(chances)
        if count:
            self._run.begin_cycle()
        return count

    def choose(self, most: int, context: int) -> int:
        self._run.begin_cycle()
        count = self._run.policy.choose(most, context)
        assert 0 <= count <= most
        return count

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        def waited() -> Sequence[float]:
            self._run.wait(self._run.drafted, READING)
            return read()

        return self._run.policy.narrow(waited)

    @property
    def nodes(self) -> int:
        return self._run.policy.nodes

    def prune(self, chances: Sequence[float]) -> int:
        self._run.wait(self._run.drafted, GROWING)
        return self._run.policy.prune(chances)

    def observe(self, cycle: Cycle) -> None:
        self._run.cycles.append(cycle)
        if self._run.policy.learns:
            self._run.policy.observe(cycle)

    def finish(self) -> None:
        self._run.policy.finish()


class ScriptedTarget:
    """Stands for a TargetView that says the run's tokens."""

    features = mx.zeros((1, 4096, 1))

    def __init__(self, run: Run):
        self._run = run

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens

    head = embed

    def forward(
        self, tokens: mx.array, cache: Any, taps: Any = ()
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        rows = tokens.shape[1]
        logits = self._run.logits(rows)
        if self._run.rows + rows >= self._run.prompt and rows == 1:
            done = self._run.forward(self._run.machine.verify(1, self._run.rows))
            self._run.waiting.append(done)
        self._run.rows += rows
        return logits, (self.features[:, :rows],)

    def takes_trees(self, cache: Any) -> bool:
        return True

    def begin(self, cache: Any) -> "ScriptedTransaction":
        return ScriptedTransaction(self._run)


class ScriptedTransaction(ScriptedTarget):
    def forward(  # type: ignore[override]
        self, tokens: mx.array, taps: Any = (), tree: Tree | None = None
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        rows = tokens.shape[1]
        self._run.waiting.append(self._run.forward(self._run.machine.verify(rows, self._run.rows)))
        logits = self._run.logits(rows)
        if tree is not None:
            logits = logits[mx.array([0, *tree.depths])]
        return logits, (self.features[:, :rows],)

    def commit(self, kept: int, path: Sequence[int] | None = None) -> None:
        self._run.rows += kept


class ScriptedDraft:
    """Stands for a DFlashDraft that guesses as the text says."""

    target_layer_ids = (0,)
    reach = None
    samples_proposals = False

    def __init__(self, run: Run):
        self._run = run
        self.block_size, self.most_proposals = run.block, run.block - 1

    def condense(self, features: Sequence[mx.array]) -> mx.array:
        return features[0][0]

    def remember(self, context: Context, c: mx.array) -> None:
        context.offset += c.shape[0]

    def propose(
        self, anchor: mx.array, context: Context, count: int, *rest: Any, **more: Any
    ) -> Proposals:
        run = self._run
        run.drafted = run.forward(run.machine.propose(run.block, run.rows))
        position = context.offset - run.prompt + 1
        right = [run.text.right(position + d, d) for d in range(count)]
        shown = [run.text.confidence(position + d, d) for d in range(count)]
        confidence = mx.array(shown) if run.confident else None
        tokens = run.tokens[position + run.prompt :]
        guessed = [token if r else WRONG for token, r in zip(tokens, right, strict=False)]
        return Proposals(mx.array(guessed), confidence=confidence)

    def lattice(
        self, anchor: mx.array, context: Context, count: int, *rest: Any, **more: Any
    ) -> Lattice:
        run = self._run
        run.drafted = run.forward(run.machine.propose(run.block, run.rows))
        position = context.offset - run.prompt + 1
        tokens, scores = [], []
        for depth in range(count):
            right, own = run.tokens[position + run.prompt + depth], position + depth
            others = [t for t in range(RIGHT + WIDTH + 1) if t != right][:WIDTH]
            rank = run.text.rank(own, depth)
            tokens.append([*others[:rank], right, *others[rank:]][:WIDTH])
            first = run.text.confidence(own, depth)
            rest = first * (1 - first)
            scores.append([first, *(rest * 0.5**r for r in range(1, WIDTH))])
        return Lattice(mx.array(tokens), mx.log(mx.array(scores)))


def fixed(machine: Machine, text: Text, block: int = 8, prompt: int = 1) -> list[float]:
    """True times with every fixed length from 0 on."""
    return [Run(FixedLength(n), machine, text, block, prompt=prompt).seconds for n in range(block)]
