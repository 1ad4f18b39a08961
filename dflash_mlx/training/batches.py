"""Token sequences with a loss mask, and batches of sequences of about equal length."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PAD_TO = 16  # lengths of batches are multiples, so that few shapes are compiled


@dataclass(frozen=True)
class Sample:
    """One document: its tokens, and which of them the model should learn to predict.

    Attributes:
        tokens: int32 [length].
        learn: bool [length].
    """

    tokens: np.ndarray
    learn: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to one length, one document a row.

    Attributes:
        tokens: int32 [B, T].
        learn: bool [B, T], False on padding.
        lengths: int32 [B].
        indices: int64 [B], which of the samples they are.
    """

    tokens: np.ndarray
    learn: np.ndarray
    lengths: np.ndarray
    indices: np.ndarray


def collate(
    samples: Sequence[Sample], pad_to: int = 1, indices: Sequence[int] | None = None
) -> Batch:
    """Pad samples to a common length, a multiple of `pad_to`; `indices` are their own if None."""
    lengths = np.array([len(sample.tokens) for sample in samples], dtype=np.int32)
    width = -(-int(lengths.max()) // pad_to) * pad_to
    tokens = np.zeros((len(samples), width), dtype=np.int32)
    learn = np.zeros((len(samples), width), dtype=bool)
    for row, sample in enumerate(samples):
        tokens[row, : lengths[row]] = sample.tokens
        learn[row, : lengths[row]] = sample.learn
    numbers = np.arange(len(samples)) if indices is None else np.array(indices)
    return Batch(tokens, learn, lengths, numbers)


def batches(
    samples: Sequence[Sample], tokens_per_batch: int, rng: random.Random
) -> Iterator[Batch]:
    """One pass over samples, neighbours in length together, the batches in random order.

    A batch holds as many samples as fit in `tokens_per_batch` with their padding, at least one.
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].tokens), rng.random()))
    groups: list[list[int]] = [[]]
    for i in order:
        width = -(-len(samples[i].tokens) // PAD_TO) * PAD_TO
        if groups[-1] and width * (len(groups[-1]) + 1) > tokens_per_batch:
            groups.append([])
        groups[-1].append(i)
    rng.shuffle(groups)
    for group in groups:
        yield collate([samples[i] for i in group], PAD_TO, group)
