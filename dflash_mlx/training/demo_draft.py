"""Train the demo draft on the demo target's own answers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx_lm.models import qwen3
from tokenizers import Tokenizer

from dflash_mlx.checkpoint import load_target
from dflash_mlx.draft.model import DFlashDraft
from dflash_mlx.training.batches import Sample
from dflash_mlx.training.demo_target import CONFIG as TARGET
from dflash_mlx.training.demo_target import encode
from dflash_mlx.training.demo_text import training_example
from dflash_mlx.training.demo_tokenizer import MASK, SPECIALS
from dflash_mlx.training.outputs import (
    greedy_continuations,
    own_outputs,
    read_samples,
    write_samples,
)
from dflash_mlx.training.qwen3_forward import hidden_states
from dflash_mlx.training.trainer import (
    FrozenTarget,
    StepReport,
    Trainer,
    TrainingOptions,
    new_draft,
    write_draft,
)

TAPS = (1, 4, 6, 8, 10)
CONFIG = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": TARGET["hidden_size"],
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 192,
    "vocab_size": TARGET["vocab_size"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": TARGET["max_position_embeddings"],
    "num_target_layers": TARGET["num_hidden_layers"],
    "block_size": 16,
    "attention_bias": False,
    "torch_dtype": "float32",
    "dflash_config": {
        "target_layer_ids": list(TAPS),
        "mask_token_id": SPECIALS.index(MASK),
    },
}


def draft_samples(
    target: Path, store: Path, count: int, log: Callable[[str], None]
) -> list[Sample]:
    """The target's own answers to `count` fresh requests, made once and kept in `store`."""
    if store.exists():
        return read_samples(store)
    loaded, tokenizer = load_target(target)
    model = cast(qwen3.Model, loaded)
    plain = Tokenizer.from_file(str(target / "tokenizer.json"))
    samples = [encode(plain, training_example(f"draft/{i}")) for i in range(count)]

    def choices(tokens: mx.array) -> mx.array:
        states, _ = hidden_states(model, tokens)
        return mx.argmax(model.model.embed_tokens.as_linear(states), axis=-1)

    def continuations(prompts: list[list[int]]) -> list[list[int]]:
        return greedy_continuations(model, tokenizer, prompts)

    samples, rewritten = own_outputs(samples, choices, continuations)
    log(f"{count} answers by the target, {rewritten} of them not as the text had them")
    write_samples(store, samples)
    return samples


def frozen(model: qwen3.Model) -> FrozenTarget:
    """The demo target for training on a CPU: its features by the cheaper forward."""

    def features(tokens: mx.array) -> mx.array:
        return mx.concatenate(hidden_states(model, tokens, TAPS)[1], axis=-1)

    embedding = model.model.embed_tokens
    return FrozenTarget(features, embedding, embedding.as_linear)


def train_draft(
    target: Path,
    directory: Path,
    samples: list[Sample],
    options: TrainingOptions,
    log: Callable[[str], None] = print,
) -> DFlashDraft:
    """Train the draft of the target in `target`; `directory` keeps the state and gets the draft."""
    model = cast(qwen3.Model, load_target(target)[0])
    draft = new_draft(CONFIG, model.model.norm.weight, options.seed)
    trainer = Trainer(draft, frozen(model), samples, options)
    state = directory / "draft-state.safetensors"
    if state.exists():
        trainer.restore(state)
    started, reports = time.perf_counter(), []
    while trainer.step_count < options.steps:
        reports.append(trainer.step())
        if trainer.step_count % 100 == 0 or trainer.step_count == options.steps:
            log(_line(reports, time.perf_counter() - started))
            reports = []
        if trainer.step_count % 500 == 0 or trainer.step_count == options.steps:
            trainer.save(state)
            write_draft(draft, CONFIG, directory / "draft")
    return draft


def _line(reports: list[StepReport], seconds: float) -> str:
    right = sum(r.right for r in reports) / np.maximum(sum(r.seen for r in reports), 1)
    places = " ".join(f"{share:.2f}" for share in right)
    loss, run = (np.mean([getattr(r, name) for r in reports]) for name in ("loss", "run"))
    return (
        f"step {reports[-1].step}: loss {loss:.4f}, right beginnings {run:.2f}, {seconds:.0f} s, "
        f"right by place {places}"
    )
