"""Train a DFlash draft for a frozen target."""

import json
import math
import random
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
from dflash_mlx.training.blocks import block_logits, block_loss, choose_blocks
from dflash_mlx.training.state import flat, restore_state, save_state, write_arrays


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
class TrainingOptions:
    """How a draft is trained.

    tokens_per_batch: padded tokens of one step's sequences; anchors: blocks drawn of each
    sequence; gamma: row k of a block weighs exp(-(k - 1) / gamma).
    """

    steps: int = 1000
    tokens_per_batch: int = 2048
    anchors: int = 16
    learning_rate: float = 1e-3
    warmup: int = 50
    gamma: float = 7.0
    weight_decay: float = 0.01
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Rises over `warmup` steps, then falls to nothing along a cosine."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


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
        options: TrainingOptions,
    ):
        self.draft, self.target = draft, target
        self.samples, self.options = samples, options
        self.step_count = 0
        self.optimizer = optim.AdamW(
            learning_rate=options.learning_rate,
            betas=[0.9, 0.98],
            weight_decay=options.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(draft.trainable_parameters())
        self._batches = self._endless_batches()
        self._loss_and_grad = nn.value_and_grad(draft, self._loss)

    def step(self) -> StepReport:
        """Train on the next batch."""
        number, options = self.step_count, self.options
        batch = next(self._batches)
        rng = np.random.default_rng([options.seed, number])
        blocks = choose_blocks(batch, options.anchors, self.draft.block_size, options.gamma, rng)
        features = self.target.features(mx.array(batch.tokens))
        arrays = (mx.array(a) for a in (blocks.first, blocks.anchors, blocks.targets))
        weights = mx.array(blocks.weights)
        self.optimizer.learning_rate = options.learning_rate_at(number)
        (loss, hits), gradients = self._loss_and_grad(mx.stop_gradient(features), *arrays, weights)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.draft, gradients)
        mx.eval(loss, hits, self.draft.parameters(), self.optimizer.state)
        self.step_count += 1
        return self._report(loss.item(), batch, np.array(hits), blocks.weights > 0)

    def save(self, file: Path) -> None:
        """Write the state from which `restore` goes on."""
        save_state(file, self.draft, self.optimizer, self.step_count)

    def restore(self, file: Path) -> None:
        """Go on where `save` was called, with the same samples and options."""
        self.step_count = restore_state(file, self.draft, self.optimizer)
        self._batches = self._endless_batches()
        for _ in range(self.step_count):
            next(self._batches)

    def _loss(
        self,
        features: mx.array,
        first: mx.array,
        anchors: mx.array,
        targets: mx.array,
        weights: mx.array,
    ) -> tuple[mx.array, mx.array]:
        embed, head = self.target.embed, self.target.head
        logits = block_logits(self.draft, features, first, anchors, embed, head)
        return block_loss(logits, targets, weights), mx.argmax(logits, axis=-1) == targets

    def _endless_batches(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            rng = random.Random(f"{self.options.seed}/{epoch}")
            yield from batches(self.samples, self.options.tokens_per_batch, rng)
            epoch += 1

    def _report(self, loss: float, batch: Batch, hits: np.ndarray, used: np.ndarray) -> StepReport:
        runs = np.logical_and.accumulate(hits & used, axis=-1).sum(axis=-1)
        blocks = used[..., 0]
        return StepReport(
            step=self.step_count,
            loss=loss,
            tokens=int(batch.lengths.sum()),
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


def write_draft(draft: DFlashDraft, config: Mapping[str, Any], directory: Path) -> None:
    """Write a draft directory in the published format; the config last, as it makes it one."""
    write_arrays(directory / "model.safetensors", flat(draft.parameters()))
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
