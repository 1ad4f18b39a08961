"""Train the demo target: a small Qwen3 language model that answers the demo text's requests."""

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import qwen3
from tokenizers import Tokenizer

from dflash_mlx.demo.making.qwen3_forward import hidden_states
from dflash_mlx.demo.making.text import (
    KINDS,
    Example,
    early_example,
    example,
    practice_example,
    training_example,
)
from dflash_mlx.demo.making.tokenizer import END
from dflash_mlx.training import fast_math
from dflash_mlx.training.batches import Batch, Sample, batches
from dflash_mlx.training.state import State, flat, restore_state, write_arrays

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 1024,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Lesson:
    """Some steps on one kind of text, the learning rate going evenly from `first` to `last`."""

    steps: int
    write: Callable[[str], Example]
    first: float
    last: float


LESSONS = (
    Lesson(4000, early_example, 3e-3, 3e-3),
    Lesson(2500, practice_example, 3e-3, 1.125e-3),
    Lesson(1000, early_example, 1.125e-3, 0.375e-3),
    Lesson(1200, training_example, 1.2e-3, 0.0),
)
WARMUP = 200


def encode(tokenizer: Tokenizer, example: Example) -> Sample:
    """The chat template's tokens of a whole example; the assistant's tokens are to be learnt."""
    tokens: list[int | None] = []
    learn: list[bool] = []
    end = tokenizer.token_to_id(END)
    for message in example.messages:
        body = tokenizer.encode(message["content"]).ids
        tokens += [tokenizer.token_to_id(f"<|{message['role']}|>"), *body, end]
        learn += [False] + [message["role"] == "assistant"] * (len(body) + 1)
    return Sample(np.array(tokens, dtype=np.int32), np.array(learn))


def training_batches(
    tokenizer: Tokenizer, tokens_per_batch: int, seed: int, write: Callable[[str], Example]
) -> Iterator[Batch]:
    """Batches of fresh training examples without end."""
    rng = random.Random(seed)
    chunk, count = 2048, 0
    while True:
        samples = [encode(tokenizer, write(f"{seed}/{count + i}")) for i in range(chunk)]
        count += chunk
        yield from batches(samples, tokens_per_batch, rng)


def taught(
    tokenizer: Tokenizer, tokens_per_batch: int, seed: int, lessons: Sequence[Lesson]
) -> Iterator[tuple[Batch, float]]:
    """Every step's batch and learning rate. A text that comes twice goes on where it stopped."""
    streams: dict[Callable, Iterator[Batch]] = {}
    step = 0
    for lesson in lessons:
        if lesson.write not in streams:
            streams[lesson.write] = training_batches(
                tokenizer, tokens_per_batch, seed, lesson.write
            )
        for i, batch in enumerate(itertools.islice(streams[lesson.write], lesson.steps)):
            rate = lesson.first + (lesson.last - lesson.first) * i / lesson.steps
            step += 1
            yield batch, rate * min(1.0, step / WARMUP)


def answer_loss(
    model: qwen3.Model, tokens: mx.array, rows: mx.array, targets: mx.array, weights: mx.array
) -> mx.array:
    """Mean cross-entropy of `targets` [N] at flat positions `rows` [N] of tokens [B, T]."""
    h = hidden_states(model, tokens)
    chosen = h.reshape(-1, h.shape[-1])[rows]
    logits = model.model.embed_tokens.as_linear(chosen)
    return (fast_math.cross_entropy(logits, targets) * weights).sum() / weights.sum()


def loss_inputs(batch: Batch) -> tuple[mx.array, ...]:
    """The arguments of `answer_loss` after the model: token t+1 is learnt at position t."""
    learn = np.zeros_like(batch.learn)
    learn[:, :-1] = batch.learn[:, 1:]
    rows = np.flatnonzero(learn)
    targets = np.roll(batch.tokens, -1, axis=1).reshape(-1)[rows]
    spare = -len(rows) % 256
    weights = np.pad(np.ones(len(rows), dtype=np.float32), (0, spare))
    arrays = (batch.tokens, np.pad(rows, (0, spare)), np.pad(targets, (0, spare)), weights)
    return tuple(mx.array(array) for array in arrays)


def train_target(
    tokenizer: Tokenizer,
    directory: Path,
    lessons: Sequence[Lesson] = LESSONS,
    tokens_per_batch: int = 2048,
    scored: int = 40,
    log: Callable[[str], None] = print,
) -> qwen3.Model:
    """Train the target from nothing; `directory` keeps its state, and a second call goes on there.

    Args:
        scored: held-out examples of each kind that are scored now and then.

    Returns:
        The trained model.
    """
    mx.random.seed(1)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(CONFIG))
    optimizer = optim.AdamW(learning_rate=lessons[0].first, betas=[0.9, 0.98], weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    state_file = directory / "state.safetensors"
    first = restore_state(state_file, model, optimizer) if state_file.exists() else 0
    loss_and_grad = nn.value_and_grad(model, answer_loss)
    steps = sum(lesson.steps for lesson in lessons)
    started, seen, losses = time.perf_counter(), 0, []
    for step, (batch, rate) in enumerate(taught(tokenizer, tokens_per_batch, 1, lessons)):
        if step < first:
            continue
        optimizer.learning_rate = rate
        loss, gradients = loss_and_grad(model, *loss_inputs(batch))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(loss, model.state, optimizer.state)
        losses.append(loss.item())
        seen += int(batch.lengths.sum())
        if (step + 1) % 100 == 0:
            speed = seen / (time.perf_counter() - started)
            log(f"step {step + 1}: loss {np.mean(losses):.4f}, {seen} tokens, {speed:.0f} tokens/s")
            losses = []
        if (step + 1) % 500 == 0 or step + 1 == steps:
            State.of(model, optimizer, step + 1).save(state_file)
            scores = {kind: answers_right(model, tokenizer, kind, count=scored) for kind in KINDS}
            log("held-out answers right: " + ", ".join(f"{k} {v:.0%}" for k, v in scores.items()))
    return model


def answers_right(model: qwen3.Model, tokenizer: Tokenizer, kind: str, count: int) -> float:
    """The share of held-out examples whose last answer greedy decoding would write as it should be.

    One forward says it: greedy decoding writes the answer exactly if every token of it is the
    argmax after the ones before it.
    """
    right = 0
    samples = [encode(tokenizer, example(kind, "held-out", seed)) for seed in range(count)]
    for sample in samples:
        tokens = mx.array(sample.tokens)[None]
        h = hidden_states(model, tokens[:, :-1])
        chosen = np.array(mx.argmax(model.model.embed_tokens.as_linear(h), axis=-1))[0]
        start = last_answer(sample)
        right += bool((chosen[start - 1 :] == sample.tokens[start:]).all())
    return right / count


def last_answer(sample: Sample) -> int:
    """Where the last answer's tokens begin."""
    return int(np.flatnonzero(~sample.learn)[-1]) + 1


def save_target(model: qwen3.Model, directory: Path) -> None:
    """Write config.json and model.safetensors, float32, as mlx_lm.load reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    weights = flat(model.parameters())
    write_arrays(directory / "model.safetensors", weights)
