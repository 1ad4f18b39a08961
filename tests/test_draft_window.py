"""Full-attention layers with a window: what they remember, and that the text stays the same."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dflash_mlx
from dflash_mlx import stream_generate
from dflash_mlx.draft import DFlashDraft, DraftConfig
from dflash_mlx.draft.context import LayerGroup
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.errors import DFlashError
from tests.tiny_pair import write_pair

SINKS = DFlashDraft.sinks


def config(**changes: Any) -> DraftConfig:
    return draft_config(
        {
            "architectures": ["DFlashDraftModel"],
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 48,
            "vocab_size": 64,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "num_target_layers": 4,
            "block_size": 4,
            "dflash_config": {"target_layer_ids": [1, 2], "mask_token_id": 63},
            **changes,
        }
    )


def filled(draft: DFlashDraft, features: mx.array, steps: list[int]) -> Any:
    """A context fed in steps, which repeat."""
    context, done = draft.make_context(), 0
    for i in range(features.shape[1]):
        if done >= features.shape[1]:
            break
        draft.extend(context, features[:, done : done + steps[i % len(steps)]])
        done += steps[i % len(steps)]
    assert context.offset == features.shape[1]
    return context


@settings(max_examples=40, deadline=None)
@given(
    limit=st.integers(4, 40),
    sinks=st.integers(0, 4),
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=12),
)
def test_a_group_keeps_the_first_and_the_last_positions(limit, sinks, counts):
    group = LayerGroup(1, 1, 1, mx.float32, limit, sinks)
    group.step = 8
    group.keys = group.values = mx.zeros((1, 1, limit + 8, 1))
    done = 0
    for n in counts:
        for start, stop in group.wanted(n):
            rows = mx.arange(done + start, done + stop, dtype=mx.float32).reshape(1, 1, -1, 1)
            group.append(rows, rows)
        done += n
    held = np.array(group.keys[0, 0, : group.length, 0]).astype(int).tolist()
    assert held == np.array(group.values[0, 0, : group.length, 0]).astype(int).tolist()
    assert held == sorted(set(held))
    assert held[:sinks] == list(range(min(sinks, done)))
    recent = min(limit - sinks, done)
    assert held[len(held) - recent :] == list(range(done - recent, done))
    assert group.keys.shape[2] <= limit + max(8, max(counts))


@pytest.mark.parametrize(
    "layer_types", [["full_attention"] * 2, ["sliding_attention", "full_attention"]]
)
@pytest.mark.parametrize("steps", [[300], [1], [7, 64, 3]])
def test_a_context_within_the_window_proposes_the_same(layer_types, steps):
    mx.random.seed(3)
    draft = DFlashDraft(config(layer_types=layer_types, sliding_window=24))
    features = mx.random.normal((1, 90, 64))
    block = mx.random.normal((1, 4, 32))
    unlimited = np.array(draft(block, filled(draft, features, steps)))
    draft.limit_context(100)
    np.testing.assert_allclose(
        np.array(draft(block, filled(draft, features, steps))), unlimited, atol=1e-5
    )


def test_what_lies_outside_is_not_seen_and_the_sinks_are():
    mx.random.seed(4)
    draft = DFlashDraft(config())
    draft.limit_context(16)
    features = np.array(mx.random.normal((1, 400, 64)))
    block = mx.random.normal((1, 4, 32))

    def block_after(changed: slice) -> np.ndarray:
        other = features.copy()
        other[:, changed] += 1.0
        return np.array(draft(block, filled(draft, mx.array(other), [400])))

    same = block_after(slice(0, 0))
    np.testing.assert_array_equal(block_after(slice(SINKS, 400 - 16)), same)
    assert np.abs(block_after(slice(0, 1)) - same).max() > 1e-4
    assert np.abs(block_after(slice(399, 400)) - same).max() > 1e-4


def test_chunks_of_a_prompt_keep_memory_flat():
    draft = DFlashDraft(config())
    draft.limit_context(32)
    short, long = (filled(draft, mx.zeros((1, n, 64)), [64]) for n in (300, 6000))
    assert long.nbytes == short.nbytes
    assert long.groups[0].keys.shape[2] <= 32 + SINKS + LayerGroup.step


def test_a_window_that_changes_nothing_or_is_too_small_is_refused():
    sliding = config(layer_types=["sliding_attention"] * 2, sliding_window=24)
    with pytest.raises(DFlashError, match="slide over 24 tokens already"):
        DFlashDraft(sliding).limit_context(100)
    with pytest.raises(DFlashError, match="at least 16"):
        DFlashDraft(config()).limit_context(15)


def test_the_text_is_plain_decodings_and_a_kept_cache_carries_on(tmp_path: Path):
    folders = write_pair(tmp_path)
    model, tokenizer = dflash_mlx.load(*folders, draft_window=16)
    prompt = tokenizer.encode("The sea, the tide and the moon. " * 12)
    plain = [
        r.token for r in mlx_lm.stream_generate(model.target, tokenizer, prompt, max_tokens=60)
    ]
    cache = dflash_mlx.make_prompt_cache(model)
    options: dict[str, Any] = {
        "prompt_cache": cache,
        "prefill_step_size": 64,
        "verify_length": None,
    }
    first = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=30, **options)]
    assert first == plain[:30]
    rest = stream_generate(model, tokenizer, plain[30:31], max_tokens=20, **options)
    assert [r.token for r in rest] == plain[31:51]
    assert model.draft.make_context().groups[0].limit == 16 + SINKS
