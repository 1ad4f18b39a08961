"""A loss over part of the vocabulary, so that a large one does not cost most of a step.

The part holds every token that the step wants predicted and the most frequent ones of the data.
The rest of the softmax's sum is estimated from tokens drawn at random (sampled softmax): drawn
tokens stand for all that are left out, so each one's logit is raised by the logarithm of how many
it stands for. Evaluation always uses the whole vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from dflash_mlx.training.batches import Sample

FREQUENT = 4096  # tokens always in the loss: beyond them a text's tokens are rare
DRAWN = 1024  # that stand for the rest: their sum then errs by a few per cent


@dataclass(frozen=True)
class Part:
    """The tokens of one step's loss.

    Attributes:
        ids: int32 [n], ascending.
        raised: float32 [n], what is added to their logits.
    """

    ids: np.ndarray
    raised: np.ndarray

    def positions(self, targets: np.ndarray) -> np.ndarray:
        """Where target ids stand in `ids`; any place for one that is not there."""
        return np.minimum(np.searchsorted(self.ids, targets), len(self.ids) - 1).astype(np.int32)


class LossVocabulary:
    """Chooses the tokens of each step's loss."""

    def __init__(self, samples: Sequence[Sample], size: int):
        """Count the tokens of samples.

        Args:
            samples: those to learn from.
            size: tokens of the whole vocabulary.
        """
        self.size = size
        counts = np.zeros(size, dtype=np.int64)
        for sample in samples:
            np.add.at(counts, sample.tokens[sample.learn], 1)
        common = np.argsort(-counts, kind="stable")[:FREQUENT]
        self._frequent = common[counts[common] > 0]

    @property
    def pays(self) -> bool:
        """Whether the vocabulary is so large that a part of it saves most of the loss's work."""
        return self.size > 4 * (FREQUENT + DRAWN)

    def part(self, targets: np.ndarray, rng: np.random.Generator, drawn: int = DRAWN) -> Part:
        """The tokens for a step that wants `targets` predicted; `drawn` stand for the rest."""
        held = np.zeros(self.size, dtype=bool)
        held[self._frequent] = True
        held[targets.reshape(-1)] = True
        left = np.flatnonzero(~held)
        chosen = rng.choice(left, min(drawn, len(left)), replace=False)
        raised = np.zeros(self.size, dtype=np.float32)
        raised[chosen] = log(max(len(left), 1) / max(len(chosen), 1))
        held[chosen] = True
        ids = np.flatnonzero(held).astype(np.int32)
        return Part(ids, raised[ids])
