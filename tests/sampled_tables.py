"""Targets and drafts that are tables, and whether a text of theirs is plain mlx_lm's."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

from dflash_mlx import make_sampler
from dflash_mlx.decode import Decoder
from dflash_mlx.policy import AdaptiveLength, Costs, Cycle, FixedLength, Learned, Policy, Sign
from tests.markov import (
    ChainedDraft,
    SelectingDraft,
    TableDraft,
    decoder_of,
    plain,
    target_table,
)

SAMPLERS: dict[str, dict[str, Any]] = {
    "cool": {"temp": 0.5},
    "hot": {"temp": 1.5},
    "top-p": {"temp": 1.1, "top_p": 0.8},
    "min-p": {"temp": 1.3, "min_p": 0.1, "min_tokens_to_keep": 3},
    "top-k": {"temp": 0.9, "top_k": 7},
    "xtc": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    "xtc always": {
        "temp": 0.7,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.03,
        "xtc_special_tokens": [3, 11],
    },
    "all": {
        "temp": 0.8,
        "top_k": 9,
        "top_p": 0.95,
        "min_p": 0.02,
        "xtc_probability": 0.4,
        "xtc_threshold": 0.1,
    },
}
TABLE = 2 * target_table(vocab=40)
BLURRED = TABLE + np.random.default_rng(9).normal(size=TABLE.shape) * 0.3
DRAFTS: dict[str, Callable[[np.ndarray], TableDraft]] = {
    "DFlash 1": TableDraft,
    "DFlash 2": SelectingDraft,
    "chain": ChainedDraft,
}
TOKENS = 60


class Whim:
    """Does anything a strategy may do, by what the draft says of its proposals too."""

    learns = True
    nodes = 0

    def __init__(self) -> None:
        self.random = random.Random(3)

    def copy(self, chances: Sequence[float], context: int) -> int:
        return self.random.choice([0, 0, self.random.randint(0, len(chances))])

    def choose(self, most: int, context: int) -> int:
        self.drafted = self.random.choice([0, self.random.randint(0, most), most])
        return self.drafted

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        if self.random.random() < 0.3:
            return self.random.randint(0, self.drafted)
        return next((i for i, chance in enumerate(read()) if chance < 0.2), self.drafted)

    def prune(self, chances: Sequence[float]) -> int:
        return len(chances)

    def observe(self, cycle: Cycle) -> None:
        pass

    def finish(self) -> None:
        pass


def auto() -> AdaptiveLength:
    """The real strategy, where drafting costs so little that it pays."""
    costs = Costs.known(1e-3, (1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3), 1e-5, frozen=True)
    return AdaptiveLength(Learned(3, costs=costs))


LENGTHS: dict[str, Callable[[], Policy]] = {
    "0": lambda: FixedLength(0),
    "1": lambda: FixedLength(1),
    "3": lambda: FixedLength(3),
    "auto": auto,
    "whim": Whim,
}


def state() -> list[int]:
    """MLX's random state in this thread."""
    return mx.random.state[0].tolist()


def ids(decoder: Decoder) -> list[int]:
    return [token.id for token in decoder.run([0])]


def equal(ours: Callable[[], list[int]], theirs: Callable[[], list[int]], seed: int = 1) -> bool:
    """Whether two ways give the same tokens after the same seed, and leave the same state."""
    mx.random.seed(seed)
    expected = [*theirs(), *state()]
    mx.random.seed(seed)
    return [*ours(), *state()] == expected


def equal_for(
    settings: dict[str, Any], draft: TableDraft, sampled: bool, length: Policy, seed: int = 1
) -> bool:
    """Whether a table's text is mlx_lm's."""
    return equal(
        lambda: ids(
            decoder_of(
                draft,
                TABLE,
                TOKENS,
                length,
                sampler=make_sampler(**settings),
                sample_proposals=sampled,
            )
        ),
        lambda: list(plain(TABLE, TOKENS, sampler=mlx_lm_sampler(**settings))),
        seed,
    )
