"""Speculative decoding with a synthetic proposer, over the target view alone.

The proposer knows the text that plain decoding writes, and is right often, sometimes or never, so
that none, part and all of a block gets accepted in every state of the cache.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from dflash_mlx.target import TargetView
from dflash_mlx.target.taps import Features

from .configs import VOCAB
from .models import build

TOKENS = 128
MODES = {"often": 0.93, "sometimes": 0.6, "never": 0.0}
PROMPTS = {"short": 5, "long": 41}  # shorter and longer than the windows


@lru_cache(maxsize=4)
def model_of(family: str, seed: int = 0) -> nn.Module:
    """The family's tiny model, built once for neighbouring tests."""
    return build(family, seed)


@lru_cache(maxsize=4)
def view_of(family: str, seed: int = 0) -> TargetView:
    """The view of that model."""
    return TargetView(model_of(family, seed))


def prompt_of(length: str, seed: int = 0) -> list[int]:
    """A random prompt."""
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(VOCAB) for _ in range(PROMPTS[length])]


@lru_cache(maxsize=64)
def plain(family: str, length: str, seed: int = 0, tokens: int = TOKENS) -> tuple[int, ...]:
    """What unmodified mlx_lm writes."""
    prompt = mx.array(prompt_of(length, seed))
    steps = generate_step(prompt, model_of(family, seed), max_tokens=tokens)
    return tuple(int(token) for token, _ in steps)


def gap(a: mx.array, b: mx.array) -> float:
    """The largest difference of two arrays."""
    largest: Any = mx.abs(a - b).max().item()
    return largest


def greedy(logits: mx.array) -> list[int]:
    """Tokens as mlx_lm takes them, row by row: [1, L, V] to L ids."""
    rows = logits[0]
    best: Any = mx.argmax(rows - mx.logsumexp(rows, axis=-1, keepdims=True), axis=-1).tolist()
    return best


def propose(text: tuple[int, ...], at: int, count: int, mode: str, rng: random.Random) -> list[int]:
    """`count` proposals for the positions from `at`: each right with the mode's probability."""
    proposals = []
    for i in range(at, at + count):
        right = text[i] if i < len(text) else 0
        wrong = (right + 1 + rng.randrange(VOCAB - 1)) % VOCAB
        proposals.append(right if rng.random() < MODES[mode] else wrong)
    return proposals


@dataclass
class Run:
    """What a speculative run left behind."""

    tokens: list[int]
    cache: list[Any]
    context: list[int]  # every token in the cache
    features: Features
    rejected: int = 0
    accepted: set[int] = field(default_factory=set)


def speculate(
    view: TargetView,
    prompt: list[int],
    text: tuple[int, ...],
    verify: int,
    mode: str,
    taps: tuple[int, ...],
    seed: int = 0,
) -> Run:
    """Emit len(text) tokens, verifying `verify` proposals a cycle."""
    rng = random.Random(f"{mode} {verify} {seed}")
    cache = view.make_cache()
    logits, features = view.forward(mx.array([prompt]), cache, taps)
    emitted = [greedy(logits[:, -1:])[0]]
    run = Run(emitted, cache, list(prompt), features)
    kept_features = [features]
    while len(emitted) < len(text):
        proposals = propose(text, len(emitted), verify, mode, rng)
        block = [emitted[-1], *proposals]
        transaction = view.begin(cache)
        logits, features = transaction.forward(mx.array([block]), taps)
        choices = greedy(logits)
        n = 0
        while n < verify and proposals[n] == choices[n]:
            n += 1
        transaction.commit(n + 1)
        kept_features.append(tuple(tap[:, : n + 1] for tap in features))
        run.context += block[: n + 1]
        emitted += [*proposals[:n], choices[n]]
        run.rejected += verify - n
        run.accepted.add(n)
    run.features = tuple(
        mx.concatenate(parts, axis=1) for parts in zip(*kept_features, strict=True)
    )
    return run
