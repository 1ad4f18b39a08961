"""Sampled text has the target's distribution: a cross-check that knows nothing of keys."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from dflash_mlx import make_sampler
from tests.markov import (
    VOCAB,
    TableDraft,
    agreeing_draft,
    chain,
    contrary_draft,
    target_table,
)


def plain_distribution(table: np.ndarray, settings: dict) -> np.ndarray:
    """Row a: what mlx_lm would draw after token a, by the definitions, in float64."""
    out = np.zeros_like(table)
    for a, logits in enumerate(table):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        keep = np.ones(len(p), bool)
        if top_p := settings.get("top_p"):
            order = np.argsort(-p)
            above = np.cumsum(p[order]) - p[order]
            keep[order[above >= top_p]] = False
        if min_p := settings.get("min_p"):
            keep &= p >= min_p * p.max()
        if top_k := settings.get("top_k"):
            keep &= np.isin(np.arange(len(p)), np.argsort(-np.where(keep, p, 0))[:top_k])
        weights = np.where(keep, p, 0) ** (1 / settings["temp"])
        out[a] = weights / weights.sum()
    return out


def excess(tokens: list[int], p: np.ndarray) -> float:
    """Chi-square of disjoint triples given their first token, as a standard normal deviate."""
    triples = Counter(zip(tokens[0::3], tokens[1::3], tokens[2::3], strict=False))
    firsts = Counter()
    for (a, _, _), count in triples.items():
        firsts[a] += count
    statistic, cells = 0.0, 0
    for a, visits in firsts.items():
        rare_seen = rare_expected = 0.0
        for b in range(VOCAB):
            for c in range(VOCAB):
                expected, seen = visits * p[a, b] * p[b, c], triples[a, b, c]
                if expected == 0 and seen:
                    return float("inf")
                if expected < 5:
                    rare_seen, rare_expected = rare_seen + seen, rare_expected + expected
                else:
                    statistic += (seen - expected) ** 2 / expected
                    cells += 1
        if rare_expected >= 5:
            statistic += (rare_seen - rare_expected) ** 2 / rare_expected
            cells += 1
    freedom = cells - len(firsts)
    assert freedom >= 10, "the distribution is too peaked to test anything"
    # Wilson and Hilferty: the cube root of chi-square / freedom is close to normal.
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize("draft", [agreeing_draft, contrary_draft])
def test_the_joint_distribution_is_the_targets(draft: Callable[[np.ndarray], TableDraft]) -> None:
    """A cross-check that knows nothing of keys: chi-square at z = 4.75, one false alarm in 10^6."""
    table, settings = target_table(), {"temp": 0.9, "top_k": 4, "top_p": 0.9, "min_p": 0.02}
    sampler = make_sampler(**settings)
    tokens = chain(draft(table), table, 4500, seed=5, sampler=sampler, sample_proposals=True)
    assert excess(tokens, plain_distribution(table, settings)) < 4.75
    assert excess(tokens, plain_distribution(table, settings | {"temp": 1.4})) > 4.75
