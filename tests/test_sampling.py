"""Speculative sampling leaves the target's joint distribution of consecutive tokens as it is.

Seeds are fixed. Each comparison is a chi-square test at z = 4.75, a false-alarm rate of about one
in a million; four planted errors show that it would notice.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

from dflash_mlx import make_sampler
from dflash_mlx.decode import acceptance, loop
from dflash_mlx.decode.sampling import Drawn
from dflash_mlx.draft import Proposals
from dflash_mlx.policy import Cycle
from tests.markov import (
    VOCAB,
    TableDraft,
    agreeing_draft,
    chain,
    contrary_draft,
    target_table,
    wavering_draft,
)

LENGTH = 7_500
SAMPLERS = {
    "temperature": {"temp": 0.8},
    "top-p": {"temp": 1.1, "top_p": 0.8},
    "min-p": {"temp": 1.3, "min_p": 0.15},
    "top-k": {"temp": 0.9, "top_k": 3},
    "all": {"temp": 0.9, "top_k": 4, "top_p": 0.9, "min_p": 0.02},
}
DRAFTS = {"agreeing": agreeing_draft, "contrary": contrary_draft}


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


@pytest.mark.parametrize("sampled", [False, True], ids=["likeliest", "sampled"])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("settings", SAMPLERS)
def test_joint_distribution_is_the_targets(settings: str, draft: str, sampled: bool) -> None:
    table, options = target_table(), SAMPLERS[settings]
    tokens = chain(
        DRAFTS[draft](table),
        table,
        LENGTH,
        seed=5,
        sampler=make_sampler(**options),
        sample_proposals=sampled,
    )
    assert excess(tokens, plain_distribution(table, options)) < 4.75


def cumulative_ratio(p_d: mx.array, q_d: mx.array) -> mx.array:
    return mx.random.uniform(shape=p_d.shape) < mx.cumprod(p_d / q_d)


def own_last_row(p: mx.array, n: mx.array) -> mx.array:
    return mx.take(p, mx.minimum(n, p.shape[0] - 2), axis=0)


class UnfilteredQ(Drawn):
    def __call__(self, logits: mx.array) -> Proposals:
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return Proposals(super().__call__(logits).tokens, mx.exp(logprobs))


# What is broken, and a sampler and draft under which it matters.
PLANTED = {
    "missing residual": (acceptance, "residual", lambda p, q: p, "temperature", wavering_draft),
    "unclipped ratio": (acceptance, "accepts", cumulative_ratio, "temperature", wavering_draft),
    "wrong bonus row": (acceptance, "following_row", own_last_row, "top-p", agreeing_draft),
    "unfiltered q": (loop, "Drawn", UnfilteredQ, "top-k", agreeing_draft),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_noticed(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, broken, settings, draft = PLANTED[error]
    monkeypatch.setattr(module, name, broken)
    table, options = target_table(), SAMPLERS[settings]
    tokens = chain(
        draft(table),
        table,
        LENGTH,
        seed=5,
        sampler=make_sampler(**options),
        sample_proposals=True,
    )
    assert excess(tokens, plain_distribution(table, options)) > 4.75


class ByConfidence:
    """Verifies more of a block the surer the draft is of what it proposed."""

    learns = True

    def choose(self, most: int, context: int) -> int:
        return min(3, most)

    def narrow(self, read: Callable[[], Sequence[float]]) -> int:
        return next((i for i, chance in enumerate(read()) if chance < 0.4), 3)

    def observe(self, cycle: Cycle) -> None:
        pass

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("sampled", [False, True], ids=["likeliest", "sampled"])
def test_the_choice_of_a_verify_length_bends_nothing(sampled: bool) -> None:
    """Were drawn proposals verified only when they are likely ones, this would show it."""
    table, options = target_table(), SAMPLERS["temperature"]
    tokens = chain(
        wavering_draft(table),
        table,
        LENGTH,
        seed=5,
        strategy=ByConfidence(),
        sampler=make_sampler(**options),
        sample_proposals=sampled,
    )
    assert excess(tokens, plain_distribution(table, options)) < 4.75


def test_an_opaque_sampler_keeps_the_distribution() -> None:
    table, options = target_table(), SAMPLERS["all"]
    tokens = chain(agreeing_draft(table), table, LENGTH, seed=6, sampler=mlx_lm_sampler(**options))
    assert excess(tokens, plain_distribution(table, options)) < 4.75


def test_a_processor_keeps_the_distribution() -> None:
    table, options = target_table(), SAMPLERS["top-p"]
    bias = mx.array([0.0, 1.0, 0.0, -1.0, 0.5, 0.0])
    tokens = chain(
        agreeing_draft(table),
        table,
        LENGTH // 2,
        seed=7,
        sampler=make_sampler(**options),
        logits_processors=[lambda _, logits: logits + bias],
        sample_proposals=True,
    )
    assert excess(tokens, plain_distribution(table + np.array(bias), options)) < 4.75


def test_xtc_tosses_its_coin_for_each_row() -> None:
    table = target_table()
    settings = {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1}
    p = plain_distribution(table, {"temp": 1.0})
    for a in range(VOCAB):
        likely = np.flatnonzero(p[a] > 0.1)
        without = p[a].copy()
        without[[i for i in likely if p[a, i] > p[a, likely].min()]] = 0
        p[a] = 0.5 * p[a] + 0.5 * without / without.sum()
    tokens = chain(agreeing_draft(table), table, LENGTH, seed=8, sampler=make_sampler(**settings))
    assert excess(tokens, p) < 4.75


class CountingSampler:
    """Opaque and with state: every third call takes the second likeliest token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        assert logprobs.shape == (1, VOCAB)
        self.calls += 1
        ranked = mx.argsort(-logprobs, axis=-1)
        return ranked[:, 1] if self.calls % 3 == 0 else ranked[:, 0]


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_sampler_with_state_is_called_as_plain_decoding_calls_it(draft: str) -> None:
    table = target_table()
    sampler = CountingSampler()
    tokens = chain(DRAFTS[draft](table), table, 60, seed=0, sampler=sampler)
    plain, expected, last = CountingSampler(), [], 0
    for _ in range(60):
        last = int(plain(mx.array(table[last : last + 1])).item())
        expected.append(last)
    assert tokens == expected
    # No row is drawn for twice; a last one may be queued ahead.
    assert sampler.calls - 60 in (0, 1)


@pytest.mark.parametrize("draft", DRAFTS)
def test_processors_see_plain_decodings_history(draft: str) -> None:
    table = target_table()
    seen: list[list[int]] = []

    def repetition_ban(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        logits[:, tokens[-2:]] -= 2.0
        return logits

    tokens = chain(DRAFTS[draft](table), table, 60, seed=0, logits_processors=[repetition_ban])
    history, expected = [0], []
    for _ in range(60):
        row = table[history[-1]].copy()
        for token in set(history[-2:]):
            row[token] -= 2.0
        expected.append(int(row.argmax()))
        history.append(expected[-1])
    assert tokens == expected
    assert seen[:60] == [history[: i + 1] for i in range(60)]


def test_greedy_samplers_are_recognised() -> None:
    from mlx_lm.sample_utils import greedy_sampler

    assert make_sampler() is greedy_sampler
    assert isinstance(acceptance.acceptance_rule(None, None), acceptance.GreedyAcceptance)
    assert isinstance(
        acceptance.acceptance_rule(mlx_lm_sampler(temp=0.0), ()), acceptance.GreedyAcceptance
    )


def test_the_contrary_draft_is_never_right_and_the_agreeing_one_often() -> None:
    table = target_table()
    for draft, low, high in ((contrary_draft(table), 0, 0), (agreeing_draft(table), 0.4, 1)):
        assert isinstance(draft, TableDraft)
        agree = (np.array(draft.table).argmax(-1) == table.argmax(-1)).mean()
        assert low <= agree <= high
