"""A target, a draft, a machine and a clock by script, around the real decode loop.

A machine is what its cycles cost; a text is what the draft would guess right. Time is counted in
plain steps and passes twice: as the policy is shown it, with noise and load, and as it would pass
on a quiet machine, which is what a policy is judged by.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from dflash_mlx.decode import Decoder, Options, PromptCache
from dflash_mlx.decode.clock import CycleClock
from dflash_mlx.draft import Context, Proposals
from dflash_mlx.policy import Cycle, FixedLength, Lap, Policy, Sign
from dflash_mlx.propose import Lattice, Tree
from tests.policy.machines import NOISES, WIDTH, Machine, Noise, Text

UNIT = 0.03  # seconds of a plain step, as they are shown
HOST = 0.04  # plain steps between a verdict and the next forward
READING = 0.03  # plain steps that reading confidences keeps the host
GROWING = 0.06  # plain steps that reading candidates and growing a tree do
RIGHT, WRONG = 1, 0  # the target's token, where no tokens are given, and one that it never is


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
