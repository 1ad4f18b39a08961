"""What a policy comes to on scripted machines and texts, through the real decode loop.

A result is the true time of plain decoding, and of the best fixed length, as multiples of the
policy's: above 1 it was faster.
"""

import random
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest

from dflash_mlx.policy import AdaptiveLength, Costs, Learned
from tests.policy.machines import MACHINES, NOISES, TEXTS, Machine, Text
from tests.policy.scripted import UNIT, Run, fixed

TOKENS = 2000
Ratios = tuple[float, float]


def slow(value: object) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@cache
def text_of(name: str, seed: int, length: int = TOKENS) -> Text:
    return Text(TEXTS[name], length, seed)


@cache
def fixed_times(machine: Machine, text: Text, block: int, prompt: int) -> list[float]:
    return fixed(machine, text, block, prompt)


def auto(
    machine: str,
    texts: Iterable[Text],
    noise: str = "quiet",
    *,
    block: int = 8,
    prompt: int = 1,
    seed: object = 0,
    learned: Learned | None = None,
    confident: bool = True,
) -> Ratios:
    """One answer after the other: speed against plain decoding and the best fixed length."""
    m, learned = MACHINES[machine], learned or Learned(block - 1)
    seconds, alone = 0.0, [0.0] * block
    for number, text in enumerate(texts):
        run = Run(
            AdaptiveLength(learned),
            m,
            text,
            block,
            NOISES[noise],
            (seed, number),
            prompt,
            confident=confident,
        )
        seconds += run.seconds
        times = fixed_times(m, text, block, prompt)
        alone = [a + b for a, b in zip(alone, times, strict=True)]
    return alone[0] / seconds, min(alone) / seconds


def mean(results: list[Ratios]) -> Ratios:
    plain, best = zip(*results, strict=True)
    return sum(plain) / len(plain), sum(best) / len(best)


def long_text(machine: str, text: str, noise: str, seeds: int = 2, **more: int) -> Ratios:
    length = more.pop("length", TOKENS)
    return mean(
        [
            auto(machine, [text_of(text, s, length)], noise, seed=(s, noise), **more)
            for s in range(seeds)
        ]
    )


def answers(chances: tuple[float, ...], seed: int, count: int = 30) -> list[Text]:
    """Short answers of 20 to 130 tokens, each steady in itself."""
    rng = random.Random(f"{chances} {seed}")
    return [
        Text([(130, rng.choice(chances))], rng.randint(20, 130), (seed, n)) for n in range(count)
    ]


GOOD, BAD, MIXED = (0.8, 0.9, 0.93), (0.0, 0.05, 0.1), (0.0, 0.1, 0.8, 0.93)


KEPT = {
    "right": lambda plain, cycle: (plain, cycle),
    "ten times as much as a whole": lambda plain, cycle: (10 * plain, [10 * c for c in cycle]),
    "a tenth as a whole": lambda plain, cycle: (plain / 10, [c / 10 for c in cycle]),
    "drafting ten times as dear": lambda plain, cycle: (plain, [10 * c for c in cycle]),
    "drafting three times as dear": lambda plain, cycle: (plain, [3 * c for c in cycle]),
    "one length ten times as dear": lambda plain, cycle: (
        plain,
        [*cycle[:4], 10 * cycle[4], *cycle[5:]],
    ),
    "drafting for nothing": lambda plain, cycle: (plain, [1.001 * plain] * 8),
}


def known(machine: str, change: Callable[[float, list[float]], tuple[float, list[float]]]) -> Costs:
    """A machine's costs, changed, as another process kept them."""
    m = MACHINES[machine]
    plain, cycle = change(1.0, [m.propose(8, 0) + m.verify(n + 1, 0) for n in range(8)])
    return Costs.known(UNIT * plain, [UNIT * c for c in cycle], 0.001)
