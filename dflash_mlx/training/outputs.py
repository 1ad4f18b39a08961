"""Texts as the target itself would write them: what a draft is best trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import batch_generate

from dflash_mlx.training.batches import Sample, collate


def greedy_continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 256,
    batch_size: int = 32,
) -> list[list[int]]:
    """The target's greedy continuation of each prompt, its stop token included if it stops.

    model and tokenizer: as mlx_lm.load gives them.
    """
    response = batch_generate(
        model,
        tokenizer,
        [list(prompt) for prompt in prompts],
        max_tokens=max_tokens,
        return_token_ids=True,
        completion_batch_size=batch_size,
    )
    stop = tokenizer.eos_token_id
    continuations = response.token_ids or []
    return [tokens if len(tokens) == max_tokens else [*tokens, stop] for tokens in continuations]


def own_outputs(
    samples: Sequence[Sample],
    choices: Callable[[mx.array], mx.array],
    continuations: Callable[[list[list[int]]], list[list[int]]],
    tokens_per_batch: int = 4096,
) -> tuple[list[Sample], int]:
    """Rewrite each sample from the first token that the target would not have chosen.

    One forward over a finished text tells whether it is the target's greedy output, far sooner
    than generating it; only where it is not does the target write on by itself.

    Args:
        samples: texts whose tokens to learn are answers, ended by the target's stop token.
        choices: tokens [B, T] -> the target's argmax after each of them, [B, T].
        continuations: prompts -> the target's greedy continuations.

    Returns:
        The samples in their order, and how many were rewritten.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].tokens))
    departures: dict[int, int] = {}
    while order:
        width = len(samples[order[-1]].tokens)
        count = max(1, tokens_per_batch // width)
        group, order = order[-count:], order[:-count]
        batch = collate([samples[i] for i in group])
        chosen = np.array(choices(mx.array(batch.tokens)))
        wrong = batch.learn[:, 1:] & (chosen[:, :-1] != batch.tokens[:, 1:])
        for row, i in enumerate(group):
            if wrong[row].any():
                departures[i] = int(wrong[row].argmax()) + 1
    result = list(samples)
    prompts = [samples[i].tokens[:at].tolist() for i, at in departures.items()]
    for (i, at), tail in zip(departures.items(), continuations(prompts), strict=True):
        result[i] = Sample(
            np.concatenate([samples[i].tokens[:at], np.array(tail, dtype=np.int32)]),
            np.concatenate([samples[i].learn[:at], np.ones(len(tail), dtype=bool)]),
        )
    return result, len(departures)


def write_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Store samples in one .npz file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name("partial-" + file.name)
    np.savez_compressed(
        partial,
        lengths=np.array([len(sample.tokens) for sample in samples]),
        tokens=np.concatenate([sample.tokens for sample in samples]),
        learn=np.concatenate([sample.learn for sample in samples]),
    )
    partial.replace(file)


def read_samples(file: Path) -> list[Sample]:
    """Samples as `write_samples` stored them."""
    with np.load(file) as stored:
        ends = np.cumsum(stored["lengths"])[:-1]
        tokens, learn = np.split(stored["tokens"], ends), np.split(stored["learn"], ends)
    return [Sample(t, m) for t, m in zip(tokens, learn, strict=True)]
