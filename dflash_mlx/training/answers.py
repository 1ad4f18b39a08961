"""Texts as the target itself would write them: what a draft is best trained on."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

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

GROUP = 64  # sequences checked, and then written on, in one go
TOGETHER = 32  # of them that are written at once at most: beyond it a batch gets hardly faster
PREFILL = 64  # tokens of a prompt in a forward, and
PROMPTS = 8  # prompts, at most
LOGITS = 1 << 28  # held at once, at most
CHECK_SECONDS = 0.25  # of one forward, about: Ctrl-C waits for it
PROBE = 8  # rows of the forward that tells how many fit into that

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

        Runs in pieces of columns, so that nobody waits long for an interrupt.

        Returns:
            [B, T]; columns before `wanted` mean nothing.
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

    def continuations(
        self, prompts: list[list[int]], limits: list[int]
    ) -> Generator[tuple[int, list[int]], None, None]:
        """What it writes after each prompt: at most `limits` tokens, its stop token included.

        Yields which prompt it is, and the tokens, as they end.
        """
        rest = set(range(len(prompts)))
        if self._pair is None and self._batches:
            try:
                for which, text in self._together(prompts, limits):
                    rest.remove(which)
                    yield which, text
            except ValueError:
                self._batches = False  # mlx-lm cannot batch every kind of cache
        for which in sorted(rest):
            yield which, self._alone(prompts[which], limits[which])

    def _together(
        self, prompts: list[list[int]], limits: list[int]
    ) -> Iterator[tuple[int, list[int]]]:
        # mlx-lm's batch_generate would leave out which of several stop tokens ended a text.
        many = max(1, min(PROMPTS, self._rows // PREFILL))
        generator = BatchGenerator(
            self.view.model,
            stop_tokens=[[token] for token in self.tokenizer.eos_token_ids],
            completion_batch_size=min(TOGETHER, self._rows),
            prefill_batch_size=many,
            prefill_step_size=min(PREFILL, self._rows // many),
        )
        try:
            numbers = {uid: k for k, uid in enumerate(generator.insert(prompts, limits))}
            texts: list[list[int]] = [[] for _ in prompts]
            while responses := generator.next_generated():
                for response in responses:
                    which = numbers[response.uid]
                    texts[which].append(int(response.token))
                    if response.finish_reason is not None:
                        yield which, texts[which]
        finally:
            generator.close()

    @cached_property
    def _rows(self) -> int:
        """Rows that a forward may have, so that it ends within the time for which Ctrl-C waits."""
        seconds = 0.0
        for _ in range(2):  # the first one also compiles and loads
            began = time.perf_counter()
            tokens = mx.zeros((1, PROBE), mx.int32)
            mx.eval(self.view.forward(tokens, self.view.make_cache())[0])
            seconds = time.perf_counter() - began
        return max(1, min(PROMPTS * PREFILL, int(PROBE * CHECK_SECONDS / seconds)))

    def _alone(self, prompt: list[int], limit: int) -> list[int]:
        if self._pair is None:
            responses = stream_generate(
                self.view.model, self.tokenizer, prompt, limit, prefill_step_size=self._rows
            )
            return [response.token for response in responses]
        written = api.stream_generate(
            self._pair, self.tokenizer, prompt, limit, prefill_step_size=self._rows
        )
        return [response.token for response in written]


@dataclass
class _Rewriting:
    """A conversation on its way: what stands, and what others say later in it."""

    tokens: list[int]
    learn: list[bool]
    to_come: list[list[int]]

    def sample(self) -> Sample:
        """As it stands."""
        return Sample(np.array(self.tokens, dtype=np.int32), np.array(self.learn))


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
        enough: asked after every answer whether to leave it at those there are.

    Returns:
        The rewritten samples, in order; None for those not answered.
    """
    known = [store.get(sample) for sample in samples]
    order = [i for i, answer in enumerate(known) if answer is None]
    order.sort(key=lambda i: len(samples[i].tokens))
    progress(len(samples) - len(order), len(samples))
    while order and not enough():
        group, order = order[:GROUP], order[GROUP:]
        rewriting = _rewrite([samples[i] for i in group], author, store.length)
        with closing(rewriting):
            for k, answer in rewriting:
                store.add(samples[group[k]], answer)
                known[group[k]] = answer
                progress(sum(sample is not None for sample in known), len(samples))
                if enough():
                    return known
    return known


def _rewrite(
    samples: list[Sample], author: Author, length: int
) -> Generator[tuple[int, Sample], None, None]:
    """Which sample it is, and what has become of it, as they are done."""
    samples = [_with_opening(sample) for sample in samples]
    asking: dict[int, _Rewriting] = {}
    for k, at in _departures(samples, author):
        sample = samples[k]
        if at is None:
            yield k, sample
            continue
        text = _Rewriting(
            sample.tokens[:at].tolist(), sample.learn[:at].tolist(), _said_after(sample, at)
        )
        if at < length:
            asking[k] = text
        else:
            yield k, text.sample()
    while asking:
        numbers = list(asking)
        prompts = [text.tokens for text in asking.values()]
        writing = author.continuations(prompts, [length - len(prompt) for prompt in prompts])
        with closing(writing):
            for which, answer in writing:
                text = asking[numbers[which]]
                text.tokens += answer
                text.learn += [True] * len(answer)
                if text.to_come and len(text.tokens) + len(text.to_come[0]) < length:
                    said = text.to_come.pop(0)
                    text.tokens += said
                    text.learn += [False] * len(said)
                else:
                    yield numbers[which], asking.pop(numbers[which]).sample()


def _with_opening(sample: Sample) -> Sample:
    """A text that is learnt from its start on needs a beginning that is given."""
    if len(sample.learn) and sample.learn[0]:
        return Sample(sample.tokens, np.arange(len(sample.tokens)) >= opening(sample))
    return sample


def _departures(samples: list[Sample], author: Author) -> Iterator[tuple[int, int | None]]:
    """Where each sample leaves the target's output, or ends before the target would end it.

    Yields which sample it is, and the position, or None where it is the target's output already.
    """
    rest = []
    for k, sample in enumerate(samples):
        if sample.learn.any():
            rest.append(k)
        else:  # nothing to check: an answer is still to come
            yield k, len(sample.tokens)
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
                yield k, int(wrong[row].argmax()) + 1
            elif tokens[-1] not in author.tokenizer.eos_token_ids or not samples[k].learn[-1]:
                yield k, len(tokens)
            else:
                yield k, None


def _said_after(sample: Sample, at: int) -> list[list[int]]:
    """The runs of tokens that are not to be learnt, from position `at` on."""
    runs: list[list[int]] = []
    for i in range(at, len(sample.tokens)):
        if not sample.learn[i]:
            if i == at or sample.learn[i - 1]:
                runs.append([])
            runs[-1].append(int(sample.tokens[i]))
    return runs
