"""Train a DFlash draft for a frozen target."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from dflash_mlx.draft.config import DraftConfig
from dflash_mlx.draft.model import DFlashDraft
from dflash_mlx.target import TargetView
from dflash_mlx.training.batches import Batch, Sample, batches
from dflash_mlx.training.blocks import Blocks, block_loss, choose_blocks, proposal_states
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.state import restore_state, save_state

WEIGHT_DECAY = 0.01  # AdamW's; small against the signal of a few thousand steps


@dataclass(frozen=True)
class FrozenTarget:
    """What training takes from a target; nothing of it changes.

    features: tokens [B, T] -> tapped outputs [B, T, taps * H]; embed: tokens [B, L] -> [B, L, H];
    head: [B, L, H] -> logits [B, L, V].
    """

    features: Callable[[mx.array], mx.array]
    embed: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]

    @classmethod
    def of(cls, view: TargetView, taps: Sequence[int]) -> "FrozenTarget":
        """Any mlx-lm target."""

        def features(tokens: mx.array) -> mx.array:
            recorded = view.forward(tokens, view.make_cache(), taps)[1]
            assert recorded is not None
            return recorded

        return cls(features, view.embed, view.head)


@dataclass(frozen=True)
class StepReport:
    """One step's figures.

    right and seen: [block_size - 1], how many rows of each place were right, of how many;
    run: mean length of the blocks' right beginnings, the bonus token included. It is what greedy
    acceptance would be if every block began where training puts it, and is above the decode loop's.
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
    """

    def __init__(
        self,
        draft: DFlashDraft,
        target: FrozenTarget,
        samples: Sequence[Sample],
        plan: Plan,
    ):
        self.draft, self.target = draft, target
        self.samples, self.plan = samples, plan
        self.step_count = 0
        self._tokens_per_batch = plan.batch_size * plan.seq_length
        self.optimizer = optim.AdamW(
            learning_rate=plan.lr,
            betas=[0.9, 0.98],
            weight_decay=WEIGHT_DECAY,
            bias_correction=True,
        )
        self.optimizer.init(draft.trainable_parameters())
        self._batches = self._endless_batches()
        self._loss_and_grad = nn.value_and_grad(draft, self._loss)

    def step(self) -> StepReport:
        """Train on the next batch."""
        began = time.perf_counter()
        number, plan = self.step_count, self.plan
        batch = next(self._batches)
        blocks, arrays = self._prepare(batch, np.random.default_rng([plan.seed, number]))
        self.optimizer.learning_rate = plan.learning_rate_at(number)
        (loss, hits), gradients = self._loss_and_grad(*arrays)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.draft, gradients)
        mx.eval(loss, hits, self.draft.parameters(), self.optimizer.state)
        self.step_count += 1
        seconds = time.perf_counter() - began
        return self._report(loss.item(), batch, np.array(hits), blocks.weights > 0, seconds)

    def accuracy(self, samples: Sequence[Sample]) -> list[float]:
        """The share of blocks whose most likely token is right, for each place of a block.

        samples: others than those trained on; their blocks are the same at every call.
        """
        right = seen = np.zeros(self.draft.block_size - 1)
        for batch in batches(samples, self._tokens_per_batch, random.Random(0)):
            blocks, arrays = self._prepare(batch, np.random.default_rng(0))
            hits, used = np.array(self._loss(*arrays)[1]), blocks.weights > 0
            right, seen = right + (hits & used).sum(axis=(0, 1)), seen + used.sum(axis=(0, 1))
        return (right / np.maximum(seen, 1)).tolist()

    def save(self, file: Path) -> None:
        """Write the state from which `restore` goes on."""
        save_state(file, self.draft, self.optimizer, self.step_count)

    def restore(self, file: Path) -> None:
        """Go on where `save` was called, with the same samples and plan."""
        self.step_count = restore_state(file, self.draft, self.optimizer)
        self._batches = self._endless_batches()
        for _ in range(self.step_count):
            next(self._batches)

    def _prepare(self, batch: Batch, rng: np.random.Generator) -> tuple[Blocks, list[mx.array]]:
        """Blocks of a batch, and the arguments of `_loss`."""
        plan = self.plan
        count = plan.blocks_of(batch.tokens.shape[1])
        blocks = choose_blocks(batch, count, self.draft.block_size, plan.gamma, rng)
        features = mx.stop_gradient(self.target.features(mx.array(batch.tokens)))
        parts = (blocks.first, blocks.anchors, blocks.targets, blocks.weights)
        return blocks, [features, *map(mx.array, parts)]

    def _loss(
        self,
        features: mx.array,
        first: mx.array,
        anchors: mx.array,
        targets: mx.array,
        weights: mx.array,
    ) -> tuple[mx.array, mx.array]:
        states = proposal_states(self.draft, features, first, anchors, self.target.embed)
        return block_loss(self.draft, states, targets, weights, self.target.head)

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


def new_draft(config: Mapping[str, Any], final_norm: mx.array | None, seed: int) -> DFlashDraft:
    """An untrained draft.

    config: as published; final_norm: [H], the target's final norm, where training starts far
    lower than from ones, because the target's head expects states of that size.
    """
    mx.random.seed(seed)
    draft = DFlashDraft(DraftConfig.from_dict(config))
    if final_norm is not None:
        draft.norm.weight = mx.array(final_norm.astype(mx.float32))
    mx.eval(draft.parameters())
    return draft
