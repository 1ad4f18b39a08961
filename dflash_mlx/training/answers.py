"""Texts as the target itself would write them: what a draft is best trained on."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx import api
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.target import TargetView
from dflash_mlx.training.answer_store import AnswerStore
from dflash_mlx.training.batches import Sample, collate
from dflash_mlx.training.data import opening

GROUP = 64  # sequences answered together at most: beyond it a batch gets hardly faster
GROUP_SECONDS = 15.0  # that a group may take: what a stopped run has to ask for again
PREFILL = 64  # tokens of each prompt in a forward, so that Ctrl-C is soon heard
LOGITS = 1 << 28  # held at once, at most
CHECK_SECONDS = 0.5  # of one forward when texts are checked: Ctrl-C waits for it

Progress = Callable[[int, int], None]


class Author:
    """The target, writing greedily; a draft helps it where there is one."""

    def __init__(self, view: TargetView, tokenizer: TokenizerWrapper, draft: DFlashDraft | None):
        self.view, self.tokenizer = view, tokenizer
        self._pair = None if draft is None else SpeculativeModel(view.model, draft)
        self._batches = True
        self._columns = 16  # of one forward in `choices`; found while it runs

    def choices(self, tokens: np.ndarray, wanted: int) -> np.ndarray:
        """Its choice after each of tokens [B, T], given those before, from column `wanted` on.

        Returns [B, T]; columns before `wanted` mean nothing. Runs in pieces of columns, so that
        nobody waits long for an interrupt.
        """
        cache, chosen, start = self.view.make_cache(), np.zeros_like(tokens), 0
        while start < tokens.shape[1]:
            began, end = time.perf_counter(), start + self._columns
            logits, _ = self.view.forward(mx.array(tokens[:, start:end]), cache)
            if end > wanted:
                chosen[:, start:end] = np.array(mx.argmax(logits, axis=-1))
            else:
                mx.eval([leaf.state for leaf in cache])
            fast = 2 * (time.perf_counter() - began) < CHECK_SECONDS
            start, self._columns = end, self._columns * 2 if fast else max(1, self._columns // 2)
        return chosen

    def continuations(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        """What it writes after each prompt: at most `limits` tokens, its stop token included."""
        if self._pair is None and self._batches:
            try:
                return self._together(prompts, limits)
            except ValueError:
                self._batches = False  # mlx-lm cannot batch every kind of cache
        return [self._alone(p, limit) for p, limit in zip(prompts, limits, strict=True)]

    def _together(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        # mlx-lm's batch_generate would leave out which of several stop tokens ended a text.
        generator = BatchGenerator(
            self.view.model,
            stop_tokens=[[token] for token in self.tokenizer.eos_token_ids],
            prefill_step_size=PREFILL,
        )
        try:
            texts: dict[int, list[int]] = {u: [] for u in generator.insert(prompts, limits)}
            while responses := generator.next_generated():
                for response in responses:
                    texts[response.uid].append(int(response.token))
        finally:
            generator.close()
        return list(texts.values())

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
    samples: Sequence[Sample],
    author: Author,
    store: AnswerStore,
    progress: Progress,
    enough: Callable[[], bool] = lambda: False,
) -> list[Sample | None]:
    """Rewrite each sample from the first token to learn that the target would not have chosen.

    One forward over a finished text tells whether it is the target's greedy output, far sooner
    than generating it; only where it is not does the target write on by itself, and answers what
    the others say later in the conversation. What it wrote is stored as it comes, and never asked
    for again.

    Args:
        samples: of those that are learnt from their start on, the `opening` is given.
        author: the target.
        store: keeps the answers; its `length` is the most tokens of a sequence.
        progress: called with samples done and their number.
        enough: asked before every group whether to leave it at those answered so far.

    Returns:
        The rewritten samples, in order; None for those not answered.
    """
    known = [store.get(sample) for sample in samples]
    order = [i for i, answer in enumerate(known) if answer is None]
    order.sort(key=lambda i: len(samples[i].tokens))
    progress(len(samples) - len(order), len(samples))
    size = 1
    while order and not enough():
        began = time.perf_counter()
        group, order = order[:size], order[size:]
        rewritten = _rewrite([samples[i] for i in group], author, store.length)
        for i, answer in zip(group, rewritten, strict=True):
            store.add(samples[i], answer)
            known[i] = answer
        each = (time.perf_counter() - began) / len(group)
        size = max(1, min(GROUP, 2 * size, int(GROUP_SECONDS / max(each, 1e-9))))
        progress(len(samples) - len(order), len(samples))
    return known


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
    # Where nothing is to be learnt there is nothing to check: an answer is still to come.
    found |= {k: len(s.tokens) for k, s in enumerate(samples) if not s.learn.any()}
    rest = [k for k in range(len(samples)) if k not in found]
    while rest:
        width = max(len(samples[k].tokens) for k in rest)
        count = max(1, LOGITS // (width * author.view.vocab_size))
        group, rest = rest[:count], rest[count:]
        batch = collate([samples[k] for k in group])
        first = int(batch.learn.any(axis=0).argmax())
        chosen = author.choices(batch.tokens, max(first - 1, 0))
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
