"""Texts as the target itself would write them: what a draft is best trained on."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import batch_generate, stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx import api
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.metal.verdicts import cache_directory
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.target import TargetView
from dflash_mlx.training.batches import Sample, collate
from dflash_mlx.training.data import opening

# Prompts answered before the answers are stored, and the most logits held at once.
CHUNK = 64
LOGITS = 1 << 28

Progress = Callable[[int, int], None]


class Author:
    """The target, writing greedily; a draft helps it where there is one."""

    def __init__(self, view: TargetView, tokenizer: TokenizerWrapper, draft: DFlashDraft | None):
        self.view, self.tokenizer = view, tokenizer
        self._pair = None if draft is None else SpeculativeModel(view.model, draft)
        self._batches = True

    def choices(self, tokens: mx.array) -> mx.array:
        """Its choice after each of tokens [B, T], given those before: [B, T]."""
        return mx.argmax(self.view.forward(tokens, self.view.make_cache())[0], axis=-1)

    def continuations(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        """What it writes after each prompt: at most `limits` tokens, its stop token included."""
        if self._pair is None and self._batches:
            try:
                return self._together(prompts, limits)
            except ValueError:
                self._batches = False  # mlx-lm cannot batch every kind of cache
        return [self._alone(p, limit) for p, limit in zip(prompts, limits, strict=True)]

    def _together(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        response = batch_generate(
            self.view.model, self.tokenizer, prompts, max_tokens=limits, return_token_ids=True
        )
        stop = self.tokenizer.eos_token_id
        written = response.token_ids or []
        return [
            tokens if len(tokens) == limit else [*tokens, stop]
            for tokens, limit in zip(written, limits, strict=True)
        ]

    def _alone(self, prompt: list[int], limit: int) -> list[int]:
        if self._pair is None:
            responses = stream_generate(self.view.model, self.tokenizer, prompt, limit)
            return [response.token for response in responses]
        return [r.token for r in api.stream_generate(self._pair, self.tokenizer, prompt, limit)]


@dataclass
class _Rewriting:
    """A conversation on its way: what stands, and what others say later in it."""

    tokens: list[int]
    learn: list[bool]
    to_come: list[list[int]]


def answered(
    samples: Sequence[Sample], author: Author, length: int, store: Path, progress: Progress
) -> list[Sample]:
    """Rewrite each sample from the first token to learn that the target would not have chosen.

    One forward over a finished text tells whether it is the target's greedy output, far sooner
    than generating it; only where it is not does the target write on by itself, and answers what
    the others say later in the conversation. What it wrote is stored as it comes, and never asked
    for again.

    Args:
        samples: of those that are learnt from their start on, the `opening` is given.
        author: the target.
        length: the most tokens of a sequence.
        store: the file that keeps the answers; see `answer_file`.
        progress: called with samples done and their number.
    """
    known = _read(store, len(samples))
    order = [i for i in range(len(samples)) if i not in known]
    order.sort(key=lambda i: len(samples[i].tokens))
    progress(len(known), len(samples))
    while order:
        group, order = order[:CHUNK], order[CHUNK:]
        found = dict(zip(group, _rewrite([samples[i] for i in group], author, length), strict=True))
        _append(store, found)
        known |= found
        progress(len(known), len(samples))
    return [known[i] for i in range(len(samples))]


def _rewrite(samples: list[Sample], author: Author, length: int) -> list[Sample]:
    samples = [_with_opening(sample) for sample in samples]
    departures = _departures(samples, author)
    changing = {
        k: _Rewriting(
            samples[k].tokens[:at].tolist(),
            samples[k].learn[:at].tolist(),
            _said_after(samples[k], at),
        )
        for k, at in departures.items()
    }
    asking = [text for text in changing.values() if len(text.tokens) < length]
    while asking:
        prompts = [text.tokens for text in asking]
        limits = [length - len(prompt) for prompt in prompts]
        written = author.continuations(prompts, limits)
        for text, answer in zip(asking, written, strict=True):
            text.tokens += answer
            text.learn += [True] * len(answer)
            if text.to_come and len(text.tokens) + len(text.to_come[0]) < length:
                said = text.to_come.pop(0)
                text.tokens += said
                text.learn += [False] * len(said)
            else:
                text.to_come.clear()
        asking = [text for text in asking if not text.learn[-1]]
    result = list(samples)
    for k, text in changing.items():
        result[k] = Sample(np.array(text.tokens, dtype=np.int32), np.array(text.learn))
    return result


def _with_opening(sample: Sample) -> Sample:
    """A text that is learnt from its start on needs a beginning that is given."""
    if len(sample.learn) and sample.learn[0]:
        return Sample(sample.tokens, np.arange(len(sample.tokens)) >= opening(sample))
    return sample


def _departures(samples: list[Sample], author: Author) -> dict[int, int]:
    """Where each sample leaves the target's output, or ends before the target would end it."""
    found: dict[int, int] = {}
    rest = list(range(len(samples)))
    while rest:
        width = max(len(samples[k].tokens) for k in rest)
        count = max(1, LOGITS // (width * author.view.vocab_size))
        group, rest = rest[:count], rest[count:]
        batch = collate([samples[k] for k in group])
        chosen = np.array(author.choices(mx.array(batch.tokens)))
        wrong = batch.learn[:, 1:] & (chosen[:, :-1] != batch.tokens[:, 1:])
        for row, k in enumerate(group):
            tokens = samples[k].tokens
            if wrong[row].any():
                found[k] = int(wrong[row].argmax()) + 1
            elif tokens[-1] not in author.tokenizer.eos_token_ids or not samples[k].learn[-1]:
                found[k] = len(tokens)
    return found


def _said_after(sample: Sample, at: int) -> list[list[int]]:
    """The runs of tokens that are not to be learnt, from position `at` on."""
    runs: list[list[int]] = []
    for i in range(at, len(sample.tokens)):
        if not sample.learn[i]:
            if i == at or sample.learn[i - 1]:
                runs.append([])
            runs[-1].append(int(sample.tokens[i]))
    return runs


def answer_file(directories: Sequence[Path], samples: Sequence[Sample], length: int) -> Path:
    """Where a target's answers to these samples are kept, in the user's cache directory.

    Args:
        directories: the target's, and its adapter's if it has one; the names, sizes and times of
            what is in them tell it apart from others and from what it was before.
        samples: to be answered.
        length: the most tokens of a sequence.
    """
    about = hashlib.sha256(f"{length}".encode())
    for directory in directories:
        for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*.json")]):
            stat = file.stat()
            about.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    for sample in samples:
        about.update(sample.tokens.tobytes() + sample.learn.tobytes())
    return cache_directory() / "answers" / f"{about.hexdigest()[:24]}.jsonl"


def _append(store: Path, found: dict[int, Sample]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    with open(store, "a", encoding="utf-8") as out:
        for i, sample in found.items():
            learn = "".join(map(str, sample.learn.astype(int)))
            out.write(json.dumps([i, sample.tokens.tolist(), learn]) + "\n")


def _read(store: Path, count: int) -> dict[int, Sample]:
    """The answers stored so far; what was being written when it was cut off is removed."""
    known: dict[int, Sample] = {}
    if not store.exists():
        return known
    whole = 0
    with open(store, "rb") as lines:
        for line in lines:
            try:
                i, tokens, learn = json.loads(line)
                sample = Sample(
                    np.array(tokens, dtype=np.int32), np.array([c == "1" for c in learn])
                )
            except (ValueError, TypeError):
                break
            if not line.endswith(b"\n") or not 0 <= i < count or len(tokens) != len(learn):
                break
            known[i] = sample
            whole += len(line)
    os.truncate(store, whole)
    return known
