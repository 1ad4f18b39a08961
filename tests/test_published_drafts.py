"""Every published draft format, read from disk and decoding exactly with a target of its family."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from dflash_mlx import SpeculativeModel, load_draft, make_sampler
from dflash_mlx.decode import Decoder, Options
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.heads.selector import CandidateSelector
from dflash_mlx.policy import FixedLength
from dflash_mlx.target import TargetView
from tests import draft_checkpoints as published
from tests.families.configs import VOCAB
from tests.families.models import build

# Draft config, target family, and what of the draft's config must have been understood.
PAIRS: dict[str, tuple[Callable[..., dict], str, dict]] = {
    "Qwen3": (published.qwen3, "qwen3", {"block_size": 16}),
    "Qwen3-Coder": (published.qwen3, "qwen3_moe", {"sliding_window": None}),
    "Qwen3.5, first drafts": (published.qwen3, "qwen3_5", {"num_hidden_layers": 5}),
    "Qwen3.5, retrained": (published.qwen3_5, "qwen3_5", {"num_hidden_layers": 6}),
    "Qwen3.6 MoE": (published.qwen3_5, "qwen3_5_moe", {"rope_theta": 1e7}),
    "Qwen3-Coder-Next": (published.qwen3_coder_next, "qwen3_next", {"num_hidden_layers": 8}),
    "Gemma 4": (published.gemma4, "gemma4", {"final_logit_softcapping": 30.0, "mask_token_id": 4}),
    "gpt-oss": (published.gpt_oss, "gpt_oss", {"head_dim": 64, "block_size": 8}),
    "Kimi K2.5": (published.kimi, "kimi_k25", {"num_hidden_layers": 6}),
    "MiniMax M2.5": (published.minimax, "minimax", {"num_hidden_layers": 5}),
    "Llama 3.1": (published.llama3_1, "llama", {"block_size": 10}),
    "Qwen3.8, DFlash 2": (published.qwen3_8, "qwen3_5", {"block_size": 8}),
    "GLM-5.3-Flash, DFlash 2": (published.glm5_3_flash, "glm_moe_dsa", {"rope_theta": 1e4}),
    "Muse-Glimmer, DFlash 2": (
        published.muse_glimmer,
        "muse_glimmer",
        {"final_logit_softcapping": 20.0},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_published_format_decodes_exactly(name: str, tmp_path: Path) -> None:
    config_of, family, understood = PAIRS[name]
    target = build(family, 0)
    view = TargetView(target)
    config = config_of(width=view.hidden_size, target_layers=view.depth, vocab_size=VOCAB)
    published.write(tmp_path / "draft", config, dtype=mx.float32)
    draft = load_draft(tmp_path / "draft")
    for key, value in understood.items():
        assert said(draft, key) == value
    assert isinstance(draft.head, CandidateSelector) == ("DFlash 2" in name)
    model = SpeculativeModel(target, draft)
    prompt = [5, 17, 3, 80, 41, 9, 2] * 4
    plain = [int(t) for t, _ in generate_step(mx.array(prompt), target, max_tokens=32)]
    assert decode(model, prompt, Options(max_tokens=32)) == plain
    mx.random.seed(0)
    drawn = decode(model, prompt, Options(max_tokens=12, sampler=make_sampler(1.0, top_p=0.9)))
    assert len(drawn) == 12 and all(0 <= token < VOCAB for token in drawn)


def said(draft: DFlashDraft, key: str) -> object:
    first = draft.config.layers[0]
    places = {"sliding_window": first.window, "rope_theta": first.rope.theta}
    return places[key] if key in places else getattr(draft.config, key)


def decode(model: SpeculativeModel, prompt: list[int], options: Options) -> list[int]:
    decoder = Decoder(
        model.view,
        model.draft,
        model.make_cache(),
        FixedLength(model.draft.block_size - 1),
        options,
        drafting=True,
        keep_cache=False,
    )
    return [token.id for token in decoder.run(prompt)]
