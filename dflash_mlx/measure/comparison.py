"""Plain mlx_lm against DFlash on the same prompts, interleaved."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.measure.difference import Difference, first_difference
from dflash_mlx.measure.run import Run, Settings, dflash_run, plain_run
from dflash_mlx.metal import selection
from dflash_mlx.pairs import SpeculativeModel

# The proofs that a warm-up asks for are waited for, and it runs again: that may ask for more.
WARM_UPS, PROOF_SECONDS = 5, 900.0

Measure = Callable[[SpeculativeModel, TokenizerWrapper, Sequence[int], Settings], Run]
# What a further side tries, as "verify length", and which: 4.
SideName = tuple[str, int | str]
Sides = Mapping[SideName, tuple[Measure, Settings]]


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt to measure.

    Attributes:
        tokens: the rendered prompt.
        kind: what it asks for; results are summed by kind.
        text: what the user says last, for whoever reads the results.
        counts: whether it belongs in the overall line.
    """

    tokens: tuple[int, ...]
    kind: str
    text: str = ""
    counts: bool = True


@dataclass(frozen=True)
class Result:
    """All runs of one prompt; those of the same index were made together.

    `sides` are those of the further sides, by name.
    `difference` is where the texts part, None where they are the same.
    """

    prompt: BenchPrompt
    plain: list[Run]
    dflash: list[Run]
    difference: Difference | None = None
    sides: dict[SideName, list[Run]] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether every pair of runs gave the same tokens."""
        return all(p.tokens == d.tokens for p, d in zip(self.plain, self.dflash, strict=True))


def compare(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[BenchPrompt],
    settings: Settings,
    *,
    repeats: int = 3,
    cooldown: float = 0.0,
    sides: Sides | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Result]:
    """Measure every prompt `repeats` times both ways, after a warm-up.

    Plain and DFlash alternate, and the one that begins changes from prompt to prompt, so that a
    machine that warms up or is disturbed treats them alike.

    Args:
        model, tokenizer: a loaded pair.
        prompts: at least one.
        settings: how to generate.
        repeats: pairs of runs per prompt, at least 1.
        cooldown: seconds to wait before each run.
        sides: what to measure besides, each in its own way with its own settings.
        progress: called with runs done, their total and what comes next.
    """
    further = sides or {}

    def result(prompt: BenchPrompt) -> Result:
        return Result(prompt, [], [], sides={name: [] for name in further})

    results = [result(prompt) for prompt in prompts]
    ways: list[tuple[Measure, Settings, Callable[[Result], list[Run]]]] = [
        (plain_run, settings, lambda r: r.plain),
        (dflash_run, settings, lambda r: r.dflash),
        *((run, how, partial(_further, name=name)) for name, (run, how) in further.items()),
    ]
    warm_up = result(prompts[0])
    plan = [warm_up, *(result for _ in range(repeats) for result in results)]
    total, done = len(ways) * len(plan), 0
    for number, found in enumerate(plan):
        first = number % len(ways)
        for run, how, runs in [*ways[first:], *ways[:first]]:
            progress(done, total, "warm-up" if found is warm_up else found.prompt.kind)
            if cooldown:
                time.sleep(cooldown)
            measure = _settled(run) if found is warm_up else run
            runs(found).append(measure(model, tokenizer, found.prompt.tokens, how))
            done += 1
    progress(done, total, "")
    return [_explained(found, model, tokenizer, settings) for found in results]


def _settled(run: Measure) -> Measure:
    """The same again until it asks for no more proofs of kernels, which are waited for.

    A proof beside a timed run would take the device from it.
    """

    def again(model: SpeculativeModel, *arguments: Any) -> Run:
        found = run(model, *arguments)
        prover = selection.current().prover
        for _ in range(WARM_UPS):
            busy = prover.busy
            if not (model.ranks.any(busy) if model.ranks else busy):
                break
            prover.settle(PROOF_SECONDS)
            found = run(model, *arguments)
        return found

    return again


def _further(result: Result, name: SideName) -> list[Run]:
    return result.sides[name]


def _explained(
    result: Result, model: SpeculativeModel, tokenizer: TokenizerWrapper, settings: Settings
) -> Result:
    if result.identical:
        return result
    plain, dflash = next(
        (p.tokens, d.tokens)
        for p, d in zip(result.plain, result.dflash, strict=True)
        if p.tokens != d.tokens
    )
    difference = first_difference(model, tokenizer, result.prompt.tokens, plain, dflash, settings)
    return replace(result, difference=difference)
