"""Train a DFlash draft for a frozen target."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from dflash_mlx.draft.dtype import parameters
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.draft.model import DFlashDraft
from dflash_mlx.target import TargetView
from dflash_mlx.training.batches import Batch, Sample, batches, collate
from dflash_mlx.training.blocks import Blocks, block_loss, choose_blocks, proposal_states
from dflash_mlx.training.features import FeatureStore
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.state import State, restore_state
from dflash_mlx.training.vocabulary import LossVocabulary

LEAST_WORK = 1 << 31  # tokens times weights of a step's part: below it, parts only cost time
WEIGHT_DECAY = 0.01  # AdamW's; small against the signal of a few thousand steps


@dataclass(frozen=True)
class FrozenTarget:
    """What training takes from a target; nothing of it changes.

    Attributes:
        features: tokens [B, T] -> tapped outputs [B, T, taps * H].
        embed: tokens [B, L] -> [B, L, H].
        head: [B, L, H] -> logits [B, L, V].
        head_rows: ids [n] -> the head's weights [n, H], or None where it does more than multiply
            by them.
    """

    features: Callable[[mx.array], mx.array]
    embed: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]
    head_rows: Callable[[mx.array], mx.array | None] = lambda ids: None

    @classmethod
    def of(cls, view: TargetView, taps: Sequence[int]) -> "FrozenTarget":
        """Any mlx-lm target."""

        def features(tokens: mx.array) -> mx.array:
            _, outputs = view.forward(tokens, view.make_cache(), taps)
            return mx.concatenate(list(outputs), axis=-1)

        return cls(features, view.embed, view.head, view.head_rows)


@dataclass(frozen=True)
class StepReport:
    """One step's figures.

    Attributes:
        right, seen: [block_size - 1], how many rows of each place were right, of how many.
        run: mean length of the blocks' right beginnings, the bonus token included. It is what
            greedy acceptance would be if every block began where training puts it, and is above
            the decode loop's.
    """

    step: int
    loss: float
    tokens: int
    seconds: float
    right: np.ndarray
    seen: np.ndarray
    run: float


class Trainer:
    """Steps of AdamW on the block loss. The same arguments give the same run.

    The state after a step is the draft's weights, the optimizer's and the step's number: data
    order and anchors follow from the seed and the number, so that a restored run goes on as it
    would have.

    Attributes:
        held: the state as `hold` found it, until a step changes it; for another thread to save
            while this one computes.
    """

    def __init__(
        self,
        draft: DFlashDraft,
        target: FrozenTarget,
        samples: Sequence[Sample],
        plan: Plan,
        store: FeatureStore | None = None,
    ):
        """`store` keeps the samples' features; without one they are computed for every step."""
        self.draft, self.target = draft, target
        self.gamma = float("inf") if plan.gamma is None else plan.gamma
        self.samples, self.plan = samples, plan
        self.step_count = 0
        self.held: State | None = None
        self._features = store.features if store else self._computed
        vocabulary = LossVocabulary(samples, draft.config.vocab_size)
        pays = vocabulary.pays and target.head_rows(mx.array([0])) is not None
        self._vocabulary = vocabulary if pays else None
        self._tokens_per_batch = plan.batch_size * plan.seq_length
        self.optimizer = optim.AdamW(
            learning_rate=plan.lr,
            betas=[0.9, 0.98],
            weight_decay=WEIGHT_DECAY,
            bias_correction=True,
        )
        self.optimizer.init(draft.trainable_parameters())
        self._weights = sum(array.size for array in parameters(draft).values())
        self._batches = self._endless_batches()
        self._loss_and_grad = nn.value_and_grad(draft, self._loss)

    def whole_vocabulary(self) -> None:
        """Compute every step's loss over the whole vocabulary, whatever that costs."""
        self._vocabulary = None

    def step(self, check: Callable[[], None] = lambda: None) -> StepReport:
        """Train on the next batch.

        Args:
            check: called between parts of it; where it raises, the state is that before the step,
                but the batch is gone.
        """
        began = time.perf_counter()
        number, plan = self.step_count, self.plan
        batch = next(self._batches)
        rng = np.random.default_rng([plan.seed, number])
        self.optimizer.learning_rate = plan.learning_rate_at(number)
        blocks = self._blocks(batch, rng)
        loss, hits, gradients = self._gradients(batch, blocks, self._features, rng, check)
        self.held = None  # or the update could not use its memory
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.draft, gradients)
        mx.eval(self.draft.parameters(), self.optimizer.state)
        self.step_count += 1
        seconds = time.perf_counter() - began
        return self._report(loss, batch, hits, blocks.weights > 0, seconds)

    def accuracy(
        self, samples: Sequence[Sample], enough: Callable[[], bool] = lambda: False
    ) -> list[float]:
        """The share of blocks whose most likely token is right, for each place of a block.

        Args:
            samples: others than those trained on; their blocks are the same at every call.
            enough: asked after every part of a batch whether to leave it at that.
        """
        right = seen = np.zeros(self.draft.block_size - 1)
        for batch in batches(samples, self._tokens_per_batch, random.Random(0)):
            blocks = self._blocks(batch, np.random.default_rng(0))
            for some, part in self._parts(batch, blocks):
                hits = np.array(self._whole_loss(part, self._computed(some))[1])
                used = part.weights > 0
                right, seen = right + (hits & used).sum(axis=(0, 1)), seen + used.sum(axis=(0, 1))
                if enough():
                    return (right / np.maximum(seen, 1)).tolist()
        return (right / np.maximum(seen, 1)).tolist()

    def first_loss(self) -> float:
        """The loss of the draft as it is on the run's first batch, over the whole vocabulary."""
        batch = next(self._endless_batches())
        blocks = self._blocks(batch, np.random.default_rng([self.plan.seed, 0]))
        total = weights = 0.0
        for some, part in self._parts(batch, blocks):
            loss, _, weight = self._whole_loss(part, self._computed(some))
            total, weights = total + (loss * weight).item(), weights + weight.item()
        return total / max(weights, 1e-6)

    def seconds_per_step(self) -> float:
        """What a step on full sequences takes here; the draft and the run stay as they are."""
        plan = self.plan
        said = np.concatenate([sample.tokens for sample in self.samples])
        tokens = np.resize(said, (plan.batch_size, plan.seq_length))
        sequences = [Sample(row, np.ones(len(row), dtype=bool)) for row in tokens]
        batch, seconds = collate(sequences), 0.0
        for _ in range(2):  # the first one also compiles and loads
            began = time.perf_counter()
            rng = np.random.default_rng(0)
            mx.eval(self._gradients(batch, self._blocks(batch, rng), self._computed, rng)[2])
            seconds = time.perf_counter() - began
        return seconds

    def save(self, file: Path) -> None:
        """Write the state from which `restore` goes on."""
        self.state().save(file)

    def state(self) -> State:
        """The state now, between two steps."""
        return State.of(self.draft, self.optimizer, self.step_count)

    def hold(self) -> None:
        """Let `held` be the state now, until the next step changes it."""
        self.held = self.state()

    def restore(self, file: Path) -> None:
        """Go on where `save` was called, with the same samples and plan."""
        self.step_count = restore_state(file, self.draft, self.optimizer)
        self._batches = self._endless_batches()
        for _ in range(self.step_count):
            next(self._batches)

    def _blocks(self, batch: Batch, rng: np.random.Generator) -> Blocks:
        count = self.plan.blocks_of(batch.tokens.shape[1])
        return choose_blocks(batch, count, self.draft.block_size, self.gamma, rng)

    def _computed(self, batch: Batch) -> mx.array:
        """The batch's features [B, T, taps * H], from the target."""
        return mx.stop_gradient(self.target.features(mx.array(batch.tokens)))

    def _parts(self, batch: Batch, blocks: Blocks) -> Iterator[tuple[Batch, Blocks]]:
        """A batch by as many sequences as hold one's full length, or are worth a part."""
        rows, width = batch.tokens.shape
        count = max(1, max(self.plan.seq_length, LEAST_WORK // self._weights) // width)
        for start in range(0, rows, count):
            some = slice(start, start + count)
            yield _rows(batch, some), _rows(blocks, some)

    def _gradients(
        self,
        batch: Batch,
        blocks: Blocks,
        features: Callable[[Batch], mx.array],
        rng: np.random.Generator,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[float, np.ndarray, Any]:
        """Loss, which rows were right [B, A, n - 1], and gradients, part by part.

        Parts bound the memory that the batch takes, and how long an interrupt waits.
        """
        head, raised, positions = self.target.head, None, lambda targets: targets
        if self._vocabulary is not None:
            kept = self._vocabulary.part(blocks.targets, rng)
            weights = self.target.head_rows(mx.array(kept.ids))
            assert weights is not None
            head, positions = partial(_multiply, weights), kept.positions
            raised = mx.array(kept.raised)
        losses, weighing, right, total = 0.0, 0.0, [], None
        for some, part in self._parts(batch, blocks):
            check()
            seen = features(some)
            mx.eval(seen)
            check()
            targets = mx.array(positions(part.targets))
            (loss, hits, weight), gradients = self._loss_and_grad(part, seen, head, targets, raised)
            gradients = tree_map(partial(mx.multiply, weight), gradients)
            if total is not None:
                gradients = tree_map(mx.add, total, gradients)
            total = gradients
            mx.eval(loss, hits, weight, total)
            losses, weighing = losses + loss.item() * weight.item(), weighing + weight.item()
            right.append(np.array(hits))
        weighing = max(weighing, 1e-6)
        mean = tree_map(lambda gradient: gradient / weighing, total)
        return losses / weighing, np.concatenate(right), mean

    def _whole_loss(self, blocks: Blocks, features: mx.array) -> Any:
        return self._loss(blocks, features, self.target.head, mx.array(blocks.targets), None)

    def _loss(
        self,
        blocks: Blocks,
        features: mx.array,
        head: Callable[[mx.array], mx.array],
        targets: mx.array,
        raised: mx.array | None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        first, anchors = mx.array(blocks.first), mx.array(blocks.anchors)
        states = proposal_states(self.draft, features, first, anchors, self.target.embed)
        weights, adaptive = mx.array(blocks.weights), self.plan.gamma is None
        return block_loss(self.draft, states, targets, weights, head, raised, adaptive=adaptive)

    def _endless_batches(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            rng = random.Random(f"{self.plan.seed}/{epoch}")
            yield from batches(self.samples, self._tokens_per_batch, rng)
            epoch += 1

    def _report(
        self, loss: float, batch: Batch, hits: np.ndarray, used: np.ndarray, seconds: float
    ) -> StepReport:
        runs = np.logical_and.accumulate(hits & used, axis=-1).sum(axis=-1)
        blocks = used[..., 0]
        return StepReport(
            step=self.step_count,
            loss=loss,
            tokens=int(batch.lengths.sum()),
            seconds=seconds,
            right=(hits & used).sum(axis=(0, 1)),
            seen=used.sum(axis=(0, 1)),
            run=1 + float(runs[blocks].mean()) if blocks.any() else 0.0,
        )


def _rows(whole: Any, rows: slice) -> Any:
    """Some rows of a dataclass of arrays [B, …]."""
    return type(whole)(*(getattr(whole, field.name)[rows] for field in fields(whole)))


def _multiply(rows: mx.array, states: mx.array) -> mx.array:
    return states @ rows.T.astype(states.dtype)


def new_draft(config: Mapping[str, Any], final_norm: mx.array | None, seed: int) -> DFlashDraft:
    """An untrained draft.

    Args:
        config: as published.
        final_norm: [H], the target's final norm, where training starts far lower than from ones,
            because the target's head expects states of that size.
    """
    mx.random.seed(seed)
    draft = DFlashDraft(draft_config(config))
    if final_norm is not None:
        draft.norm.weight = mx.array(final_norm.astype(mx.float32))
    mx.eval(draft.parameters())
    return draft
