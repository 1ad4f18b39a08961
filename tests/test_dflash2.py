"""DFlash 2 against plain NumPy: convolutions, selector, its sparse q, and decoding with it."""

import math
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.decode.sampling import Drawn, Likeliest, VisibleSampler
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.draft.heads.selector import CandidateSelector
from dflash_mlx.errors import CheckpointError
from tests import plain_draft
from tests.test_draft import BASE, TAPS, random_draft


def config_of(**dflash: float) -> dict:
    """Published keys, scaled down; `dflash` overrides those inside dflash_config."""
    return BASE | {
        "architectures": ["DFlash2DraftModel"],
        "is_causal": True,
        "layer_types": ["sliding_attention"] * 3,
        "sliding_window": 20,
        "dflash_config": {
            "block_size": 6,
            "target_layer_ids": [1, 5, 9],
            "mask_token_id": 63,
            "conv_kernel_size": 2,
            "conv_group_size": 16,
            "selector_rank": 8,
            "selector_top_k": 5,
            **dflash,
        },
    }


VARIANTS = {
    "as published": {},
    "cap inside": {"final_logit_softcapping": 4.0, "output_multiplier": 0.196},
    "longer kernel": {"conv_kernel_size": 4, "conv_group_size": 8},
    "one channel a group": {"conv_group_size": 1, "selector_rank": 3},
    "scaled embeddings": {"input_embedding_scale": 2.5, "selector_top_k": 64},
    "one candidate": {"selector_top_k": 1},
}


def plain_block(
    tensors: plain_draft.Tensors, config: dict, table: np.ndarray, features: np.ndarray, anchor: int
) -> tuple[np.ndarray, np.ndarray]:
    """The proposal rows' hidden states [5, H] and logits [5, V]."""
    dflash = config["dflash_config"]
    block = table[[anchor] + [dflash["mask_token_id"]] * 5]
    embeddings = block * dflash.get("input_embedding_scale", 1.0)
    hidden = plain_draft.layer_outputs(tensors, config, embeddings, features)[-1][1:]
    logits = hidden @ table.T * dflash.get("output_multiplier", 1.0)
    cap = dflash.get("final_logit_softcapping") or config.get("final_logit_softcapping")
    return hidden, logits if cap is None else cap * np.tanh(logits / cap)


@pytest.mark.parametrize("outer", [{}, {"final_logit_softcapping": 3.0}], ids=["", "cap outside"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_proposals_over_many_cycles(variant: str, outer: dict) -> None:
    if outer and "final_logit_softcapping" in VARIANTS[variant]:
        pytest.skip("the cap is inside already")
    config = config_of(**VARIANTS[variant]) | outer
    draft, tensors = random_draft(config)
    assert isinstance(draft.head, CandidateSelector)
    rng = np.random.default_rng(2)
    table = rng.standard_normal((64, 48))
    weights = mx.array(table, mx.float32)
    context, features = draft.make_context(), np.zeros((0, TAPS * 48))
    for rows in (30, 1, 4, 2, 270, 5):
        new = rng.standard_normal((rows, TAPS * 48))
        features = np.concatenate([features, new])
        draft.extend(context, mx.array(new[None], mx.float32))
        anchor = int(rng.integers(64))
        hidden, logits = plain_block(tensors, config, table, features, anchor)
        top_k = config["dflash_config"]["selector_top_k"]
        want, _ = plain_draft.select(tensors, anchor, hidden, logits, top_k)
        proposals = draft.propose(
            mx.array([anchor]),
            context,
            5,
            lambda t: weights[t],
            lambda h: h @ weights.T,
            Likeliest(),
        )
        assert proposals.tokens.tolist() == want
        assert proposals.q is None


def test_sampled_proposals_come_from_the_q_they_carry() -> None:
    """q is softmax(S / T) along the drawn chain, and the draws follow it."""
    config, temperature = config_of(), 0.7
    draft, tensors = random_draft(config)
    rng = np.random.default_rng(4)
    hidden = rng.standard_normal((3, 48)) * 0.3
    logits = rng.standard_normal((3, 64))
    counts: Counter = Counter()
    runs = 3000
    mx.random.seed(1)
    for run in range(runs):
        proposals = draft.candidate_selector.select(
            mx.array([9]), mx.array(hidden, mx.float32), mx.array(logits), 5, temperature
        )
        tokens = proposals.tokens.tolist()
        counts[tokens[0]] += 1
        if run >= 40:
            continue
        before = 9
        for t, token in enumerate(tokens):
            scores = plain_draft.select(tensors, before, hidden[t : t + 1], logits[t : t + 1], 5)[
                1
            ][0]
            total = sum(math.exp(s / temperature) for s in scores.values())
            q = dict(zip(proposals.support[t].tolist(), proposals.q[t].tolist(), strict=True))
            assert q.keys() == scores.keys() and token in q
            for b, s in scores.items():
                assert q[b] == pytest.approx(math.exp(s / temperature) / total, abs=1e-5)
            before = token
    scores = plain_draft.select(tensors, 9, hidden[:1], logits[:1], 5)[1][0]
    total = sum(math.exp(s / temperature) for s in scores.values())
    for b, s in scores.items():
        p = math.exp(s / temperature) / total
        # Five standard deviations: a false alarm in about two million.
        assert abs(counts[b] / runs - p) < 5 * math.sqrt(p * (1 - p) / runs)


def test_temperature_decides_whether_tokens_are_drawn() -> None:
    draft, _ = random_draft(config_of())
    context = draft.make_context()
    draft.extend(context, mx.random.normal((1, 9, TAPS * 48)))
    table = mx.random.normal((64, 48))
    sampler = VisibleSampler(0.8, 0.0, 0.0, 1, 0, 0.0, 0.1, None)
    drawn = draft.propose(
        mx.array([3]), context, 4, lambda t: table[t], lambda h: h @ table.T, Drawn(sampler)
    )
    assert drawn.q.shape == drawn.support.shape == (4, 5)
    assert mx.allclose(drawn.q.sum(axis=-1), mx.ones(4), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conv_group_size": 7}, "conv_group_size 7"),
        ({"selector_top_k": 65}, "selector_top_k 65"),
        ({"selector_rank": None}, "lacks selector_rank"),
        ({"conv_kernel_size": 0}, "conv_kernel_size 0"),
    ],
)
def test_values_that_cannot_be(changes: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        draft_config(config_of(**changes))
