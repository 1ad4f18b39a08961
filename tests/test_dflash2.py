"""DFlash 2 against plain NumPy: convolutions, the selector, and what it draws."""

import math

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.decode import make_sampler
from dflash_mlx.decode.randomness import Draws, OwnState
from dflash_mlx.decode.sampling import Drawn, Likeliest
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


def test_drawn_proposals_are_those_of_their_numbers() -> None:
    """Each is the candidate in whose share of softmax(S / T), ordered by id, the number falls."""
    config, temperature, cycles = config_of(), 0.7, 60
    draft, tensors = random_draft(config)
    rng = np.random.default_rng(4)
    sampler = make_sampler(temperature)
    draws = Draws(OwnState(1))
    seen = set()
    for _ in range(cycles):
        hidden = rng.standard_normal((3, 48)) * 0.3
        logits = rng.standard_normal((3, 64))
        proposals = draft.head.select(
            mx.array([9]), mx.array(hidden, mx.float32), mx.array(logits), 5, Drawn(sampler, draws)
        )
        before = 9
        for t, token in enumerate(proposals.tokens.tolist()):
            scores = plain_draft.select(tensors, before, hidden[t : t + 1], logits[t : t + 1], 5)[
                1
            ][0]
            total = sum(math.exp(s / temperature) for s in scores.values())
            q = {b: math.exp(scores[b] / temperature) / total for b in sorted(scores)}
            below = sum(p for b, p in q.items() if b < token)
            number = draws.uniform(3)[t, -1].item()
            assert below - 1e-5 <= number <= below + q[token] + 1e-5
            assert proposals.confidence[t].item() == pytest.approx(q[token], abs=1e-5)
            seen.add(sorted(scores).index(token))
            before = token
        draws.move(3)
    assert seen == set(range(5))


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
