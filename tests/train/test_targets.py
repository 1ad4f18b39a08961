"""Targets of every kind are trained for."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as load_plain
from mlx_lm.utils import quantize_model, save_model

from dflash_mlx import load, stream_generate
from dflash_mlx.target import TargetView
from dflash_mlx.training import Plan, train
from dflash_mlx.training.batches import Sample
from dflash_mlx.training.design import even_taps
from dflash_mlx.training.run import final_norm
from dflash_mlx.training.trainer import FrozenTarget, Trainer, new_draft
from tests import tiny_pair
from tests.families.configs import CONFIGS
from tests.families.models import build, configure
from tests.train.runs import (
    QUESTIONS,
    SMALL,
    conversation,
    log,
    plainly,
    write_rows,
)


def test_a_quantized_target_is_trained_for(wordy: Path, data: Path, tmp_path: Path) -> None:
    model, tokenizer = load_plain(str(wordy))[:2]
    config = json.loads((wordy / "config.json").read_text())
    model, config = quantize_model(model, config, 32, 8)
    save_model(tmp_path / "8bit", model)
    (tmp_path / "8bit/config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path / "8bit")
    train(tmp_path / "8bit", data, tmp_path / "made", steps=2, regenerate=8, **SMALL)
    pair = load(tmp_path / "8bit", tmp_path / "made")
    tokens = [r.token for r in stream_generate(*pair, "Hi", 30, verify_length=None)]
    assert tokens == plainly(tmp_path / "8bit", "Hi", 30)


@pytest.mark.slow
def test_a_hybrid_target_gets_a_draft_that_is_accepted(tmp_path: Path) -> None:
    words = tiny_pair.vocabulary(tiny_pair.SENTENCE)
    kind, config = CONFIGS["qwen3_5"]
    text = {**config["text_config"], "vocab_size": len(words), "tie_word_embeddings": False}
    mx.random.seed(3)
    model = configure(kind, {"text_config": text})
    # Its layers are at work, and the sentence is heard above them.
    language = model.language_model
    embedding = 2 * mx.random.normal(language.model.embed_tokens.weight.shape)
    language.model.embed_tokens.weight = embedding
    language.lm_head.weight = tiny_pair.reciting_head(embedding, words, tiny_pair.SENTENCE)
    folder, made = tmp_path / "target", tmp_path / "made"
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text}))
    tiny_pair.write_tokenizer(folder, words)
    asked = [f"{q} {i}" for i in range(6) for q in QUESTIONS]
    file = write_rows(tmp_path / "data.jsonl", [conversation(q) for q in asked])
    options = {**SMALL, "batch_size": 4, "anchors": 16, "draft_layers": 2, "regenerate": 48}
    train(folder, file, made, steps=400, eval_every=200, lr=3e-3, **options)
    untrained = train(folder, file, tmp_path / "raw", steps=1, lr=1e-9, **options)
    assert log(made, "acceptance_length")[-1] > max(2 * untrained.acceptance_length, 2.5)
    pair = load(folder, made)
    for prompt in ("Hi 3", "Nobody asked this"):
        tokens = [r.token for r in stream_generate(*pair, prompt, 60, verify_length=None)]
        assert tokens == plainly(folder, prompt, 60)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_trained_for(family: str) -> None:
    """Sequences of a batch neither see each other nor their padding, and gradients are numbers."""
    view = TargetView(build(family))
    taps = even_taps(view.depth)
    frozen = FrozenTarget.of(view, taps)
    tokens = np.random.default_rng(0).integers(1, view.vocab_size, (2, 40)).astype(np.int32)
    tokens[1, 25:] = 0
    together = frozen.features(mx.array(tokens))
    for row, length in enumerate((40, 25)):
        alone = frozen.features(mx.array(tokens[row : row + 1, :length]))[0]
        assert mx.allclose(together[row, :length], alone, rtol=1e-3, atol=1e-4)
    config = {
        "architectures": ["DFlashDraftModel"],
        "hidden_size": view.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": view.vocab_size,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "block_size": 4,
        "dflash_config": {"target_layer_ids": taps, "mask_token_id": 0},
    }
    samples = [Sample(tokens[0], np.ones(40, bool)), Sample(tokens[1, :25], np.ones(25, bool))]
    plan = Plan("", Path(), steps=2, batch_size=2, seq_length=40, anchors=4)
    trainer = Trainer(new_draft(config, final_norm(view), 0), frozen, samples, plan)
    before = dict(tree_flatten(trainer.draft.parameters()))
    assert all(np.isfinite(trainer.step().loss) for _ in range(2))
    after = dict(tree_flatten(trainer.draft.parameters()))
    assert all(mx.all(mx.isfinite(array)) for array in after.values())
    assert not mx.array_equal(before["fc.weight"], after["fc.weight"])
