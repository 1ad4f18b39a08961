"""Plain mlx_lm against DFlash on the same prompts, interleaved."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.measure.difference import Difference, first_difference
from dflash_mlx.measure.run import Run, Settings, dflash_run, plain_run
from dflash_mlx.pairs import SpeculativeModel

Measure = Callable[[SpeculativeModel, TokenizerWrapper, Sequence[int], Settings], Run]


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

    `fixed` are the runs of a sweep: DFlash with a fixed verify length, for each length.
    `difference` is where the texts part, None where they are the same.
    """

    prompt: BenchPrompt
    plain: list[Run]
    dflash: list[Run]
    difference: Difference | None = None
    fixed: dict[int, list[Run]] = field(default_factory=dict)

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
    sweep: Sequence[int] = (),
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
        sweep: verify lengths to measure besides, each as a side of its own.
        progress: called with runs done, their total and what comes next.
    """
    results = [Result(prompt, [], [], fixed={length: [] for length in sweep}) for prompt in prompts]
    sides: list[tuple[Measure, Settings, Callable[[Result], list[Run]]]] = [
        (plain_run, settings, lambda r: r.plain),
        (dflash_run, settings, lambda r: r.dflash),
    ]
    for length in sweep:
        at = partial(_fixed, length=length)
        sides.append((dflash_run, replace(settings, verify_length=length), at))
    warm_up = Result(prompts[0], [], [], fixed={length: [] for length in sweep})
    plan = [warm_up, *(result for _ in range(repeats) for result in results)]
    total, done = len(sides) * len(plan), 0
    for number, result in enumerate(plan):
        first = number % len(sides)
        for run, how, runs in [*sides[first:], *sides[:first]]:
            progress(done, total, "warm-up" if result is warm_up else result.prompt.kind)
            if cooldown:
                time.sleep(cooldown)
            runs(result).append(run(model, tokenizer, result.prompt.tokens, how))
            done += 1
    progress(done, total, "")
    return [_explained(result, model, tokenizer, settings) for result in results]


def _fixed(result: Result, length: int) -> list[Run]:
    return result.fixed[length]


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
