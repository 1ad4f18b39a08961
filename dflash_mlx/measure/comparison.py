"""Plain mlx_lm against DFlash on the same prompts, interleaved."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.measure.difference import Difference, first_difference
from dflash_mlx.measure.run import Run, Settings, dflash_run, plain_run
from dflash_mlx.pairs import SpeculativeModel


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
    """All runs of one prompt, in pairs.

    `difference` is where the texts part, None where they are the same or were not compared;
    `compared` is whether equal text can be expected (it cannot when tokens are sampled).
    """

    prompt: BenchPrompt
    plain: list[Run]
    dflash: list[Run]
    compared: bool
    difference: Difference | None

    @property
    def identical(self) -> bool | None:
        """Whether every pair of runs gave the same tokens; None if not compared."""
        if not self.compared:
            return None
        return all(p.tokens == d.tokens for p, d in zip(self.plain, self.dflash, strict=True))


def compare(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[BenchPrompt],
    settings: Settings,
    *,
    repeats: int = 3,
    cooldown: float = 0.0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Result]:
    """Measure every prompt `repeats` times both ways, after a warm-up.

    Plain and DFlash alternate, and so does which of them goes first, so that a machine that warms
    up or is disturbed treats them alike.

    Args:
        model, tokenizer: a loaded pair.
        prompts: at least one.
        settings: how to generate.
        repeats: pairs of runs per prompt, at least 1.
        cooldown: seconds to wait before each run.
        progress: called with runs done, their total and what comes next.
    """
    total, done = 2 * (repeats * len(prompts) + 1), 0
    results = [Result(prompt, [], [], settings.temp == 0, None) for prompt in prompts]
    plans = [(prompts[0], None)] + [(r.prompt, r) for _ in range(repeats) for r in results]
    for number, (prompt, result) in enumerate(plans):
        sides = [plain_run, dflash_run]
        for side in sides if number % 2 else reversed(sides):
            progress(done, total, "warm-up" if result is None else prompt.kind)
            if cooldown:
                time.sleep(cooldown)
            run = side(model, tokenizer, prompt.tokens, settings)
            done += 1
            if result is not None:
                (result.plain if side is plain_run else result.dflash).append(run)
    progress(done, total, "")
    return [_explained(result, model, tokenizer, settings) for result in results]


def _explained(
    result: Result, model: SpeculativeModel, tokenizer: TokenizerWrapper, settings: Settings
) -> Result:
    if result.identical is not False:
        return result
    plain, dflash = next(
        (p.tokens, d.tokens)
        for p, d in zip(result.plain, result.dflash, strict=True)
        if p.tokens != d.tokens
    )
    difference = first_difference(model, tokenizer, result.prompt.tokens, plain, dflash, settings)
    return Result(result.prompt, result.plain, result.dflash, True, difference)
