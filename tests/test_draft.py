"""The draft's forward against a plain NumPy float64 one, over many cycles of cached context."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dflash_mlx.checkpoint import build_draft
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.target.watch import Watch
from tests import plain_draft

TAPS = 3
BASE = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "num_target_layers": 12,
    "block_size": 6,
    "dflash_config": {"target_layer_ids": [1, 5, 9], "mask_token_id": 63},
}
SLIDING = ["sliding_attention"] * 3
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
VARIANTS = {
    "full": {},
    "full, causal": {"is_causal": True},
    "bias": {"attention_bias": True},
    "sliding": {"layer_types": SLIDING, "sliding_window": 20},
    "sliding, bidirectional": {
        "layer_types": SLIDING,
        "sliding_window": 20,
        "is_causal": False,
    },
    "mixed": {"layer_types": MIXED, "sliding_window": 9},
    "window of one": {"layer_types": MIXED, "sliding_window": 1},
    "one head per query": {"num_key_value_heads": 4},
}


def random_draft(config: dict, seed: int = 0) -> tuple[DFlashDraft, plain_draft.Tensors]:
    mx.random.seed(seed)
    parsed = draft_config(config)
    draft = DFlashDraft(parsed)
    tensors = {
        name: mx.random.normal(a.shape) * (0.2 if a.ndim == 2 else 0.3) + (a.ndim == 1)
        for name, a in tree_flatten(draft.parameters())
    }
    built = build_draft(parsed, tensors)
    return built, {name: np.array(a, np.float64) for name, a in tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_layer_over_many_cycles(variant: str) -> None:
    config = BASE | VARIANTS[variant]
    draft, tensors = random_draft(config)
    rng = np.random.default_rng(1)
    context = draft.make_context()
    features = np.zeros((0, TAPS * 48))
    # Chunks longer than windows and buffers, single rows, and what blocks usually commit.
    for rows in (40, 1, 3, 6, 2, 300, 1, 5, 260, 4, 4, 4):
        new = rng.standard_normal((rows, TAPS * 48))
        features = np.concatenate([features, new])
        draft.extend(context, mx.array(new[None], mx.float32))
        assert context.offset == len(features)
        embeddings = rng.standard_normal((6, 48))
        expected = plain_draft.layer_outputs(tensors, config, embeddings, features)
        outputs: list[mx.array] = []
        with Watch([(layer, outputs) for layer in draft.layers]):
            outputs.append(draft(mx.array(embeddings[None], mx.float32), context))
        for got, want in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(np.array(got[0]), want, rtol=2e-4, atol=2e-4)


def test_a_windowed_context_does_not_grow() -> None:
    draft, _ = random_draft(BASE | VARIANTS["sliding"])
    context = draft.make_context()
    before = context.nbytes
    for rows in (700, 1, 40, 5, 900):
        draft.extend(context, mx.random.normal((1, rows, TAPS * 48)))
        mx.eval(context.arrays)
    assert context.nbytes == before
    assert context.offset == 1646


def test_a_rewound_context_equals_one_that_never_went_further() -> None:
    draft, _ = random_draft(BASE | VARIANTS["mixed"])
    features = mx.random.normal((1, 70, TAPS * 48))
    straight, rewound = draft.make_context(), draft.make_context()
    draft.extend(straight, features[:, :50])
    draft.extend(rewound, features[:, :47])
    draft.extend(rewound, features[:, 47:53])
    rewound.rewind(50)
    block = mx.random.normal((1, 6, 48))
    for _ in range(2):
        assert mx.allclose(draft(block, straight), draft(block, rewound), atol=1e-5)
        draft.extend(straight, features[:, 50:52])
        draft.extend(rewound, features[:, 50:52])


def test_only_proposal_rows_reach_the_head() -> None:
    draft, _ = random_draft(BASE | {"final_logit_softcapping": 5.0})
    context = draft.make_context()
    draft.extend(context, mx.random.normal((1, 9, TAPS * 48)))
    table = mx.random.normal((64, 48))
    seen = []

    def head(hidden: mx.array) -> mx.array:
        seen.append(hidden.shape)
        return hidden @ table.T

    logits = []
    for count in (1, 3, 5):
        draft.propose(mx.array([7]), context, count, lambda t: table[t], head, logits.append)
    assert seen == [(1, 1, 48), (1, 3, 48), (1, 5, 48)]
    assert mx.allclose(logits[2][:3], logits[1], atol=1e-5)
    masks = mx.array([[7] + [63] * 5])
    expected = draft(table[masks], context)[0, 1:] @ table.T
    assert mx.allclose(logits[2], 5.0 * mx.tanh(expected / 5.0), atol=1e-4)


def test_features_are_cast_to_the_drafts_dtype() -> None:
    draft, _ = random_draft(BASE)
    draft.set_dtype(mx.bfloat16)
    context = draft.make_context()
    draft.extend(context, mx.random.normal((1, 9, TAPS * 48)))
    assert all(array.dtype == mx.bfloat16 for array in context.arrays)
    assert draft(mx.random.normal((1, 6, 48)), context).dtype == mx.bfloat16
