"""Train a draft from a user's texts: everything from the files to the finished directory."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.conversation.template import Template
from dflash_mlx.decode.interrupts import Interrupts
from dflash_mlx.draft import DFlash2Draft, DFlashDraft
from dflash_mlx.draft.dtype import is_quantized
from dflash_mlx.errors import DFlashError, said
from dflash_mlx.pairs import check_pair
from dflash_mlx.repository import read_config, resolve
from dflash_mlx.target import TargetView
from dflash_mlx.target_checkpoint import load_target
from dflash_mlx.training.answers import Author, answer_file, answered
from dflash_mlx.training.batches import Sample
from dflash_mlx.training.card import training_card
from dflash_mlx.training.data import Row, can_teach, encode_rows, read_rows
from dflash_mlx.training.design import design_draft
from dflash_mlx.training.directory import TrainingDirectory
from dflash_mlx.training.evaluation import Evaluation, acceptance_length
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.trainer import (
    FrozenTarget,
    StepReport,
    Trainer,
    new_draft,
)

HELD_OUT = 32  # sequences, or a tenth where there are few
_NO_MEMORY = re.compile("allocat|memory", re.IGNORECASE)

Stage = Callable[[str, int, int], None]
Event = StepReport | Evaluation


class Training:
    """A run: prepared when it is made, and then a loop over its events.

        for event in Training(plan, Path("my-draft")).run():
            ...

    Attributes:
        trainer: the state of the run.
        config: the draft's config.json.
        remarks: what was found in the data that the user should know.
    """

    def __init__(
        self,
        plan: Plan,
        output: Path,
        *,
        resume: bool = False,
        eval_every: int = 250,
        save_every: int = 250,
        trust_remote_code: bool = False,
        stage: Stage = lambda what, done, total: None,
    ):
        """Load, read and answer what the plan names.

        Args:
            plan: see there.
            output: the new draft's directory, or with `resume` that of the run to go on with.
            resume: go on exactly where the run in `output` stopped.
            eval_every, save_every: steps between two; the last step is always both.
            trust_remote_code: of the target, as in `load`.
            stage: called with what is being done now, how much of it is done, and of how much.

        Raises:
            DFlashError: the plan cannot be; the data cannot be read or is too little; the target
                cannot be tapped; the output exists, or holds no run to resume.
        """
        plan.check()
        for name, value in (("eval_every", eval_every), ("save_every", save_every)):
            if value < 1:
                raise DFlashError(f"{name} is {value}; give at least 1.")
        rows = read_rows(plan.data)
        self.plan, self.directory = plan, TrainingDirectory(output)
        self.eval_every, self.save_every = eval_every, save_every
        options = plan.options()
        saved = self.directory.resume(options) if resume else self.directory.check_new()

        stage("Loading the target", 0, 0)
        target = resolve(plan.target, plan.revision)
        model, self.tokenizer = load_target(
            target,
            adapter_path=plan.adapter_path,
            trust_remote_code=trust_remote_code,
        )
        self.view = TargetView(model)
        draft, self.config = self._draft(read_config(target))
        self._dtype = self.view.embed(mx.array([[0]])).dtype

        stage("Reading the data", 0, 0)
        samples, self.remarks = self._samples(rows, target, draft if plan.init else None, stage)
        self.held_out, samples = _split(samples, plan.seed)
        self.trainer = Trainer(
            draft,
            FrozenTarget.of(self.view, draft.target_layer_ids),
            samples,
            plan,
        )
        if saved:
            self.trainer.restore(self.directory.state)
        if resume:
            self.directory.rewind_log(self.trainer.step_count)
        else:
            self.directory.begin(options)
        self.evaluation: Evaluation | None = None

    def run(self) -> Iterator[Event]:
        """Train to the last step, and say how each step and each evaluation went.

        Ctrl-C is honoured between steps: it saves, and leaves as KeyboardInterrupt.

        Raises:
            DFlashError: memory ran out, or the output cannot be written.
        """
        interrupts = Interrupts()
        try:
            with interrupts:
                while self.trainer.step_count < self.plan.steps:
                    interrupts.check()
                    with self._memory():
                        report = self.trainer.step()
                    self._log(report)
                    yield report
                    last = report.step == self.plan.steps
                    if last or report.step % self.eval_every == 0:
                        with self._memory():
                            self.evaluation = self.evaluate()
                        self.directory.append(asdict(self.evaluation))
                        yield self.evaluation
                    if last or report.step % self.save_every == 0:
                        self.save()
        except KeyboardInterrupt:
            self.save()
            raise

    def evaluate(self) -> Evaluation:
        """The draft as it is now, on the held-out sequences."""
        trainer = self.trainer
        length, tokens = acceptance_length(self.view, self.tokenizer, trainer.draft, self.held_out)
        return Evaluation(trainer.step_count, length, tokens, trainer.accuracy(self.held_out))

    def save(self) -> None:
        """Write the draft, as published ones are, and the run's state."""
        about = training_card(self.directory.path.name, self.plan, self.trainer, self.evaluation)
        self.directory.save(self.trainer, self.config, self._dtype, about)

    def _draft(self, target: dict[str, Any]) -> tuple[DFlashDraft, dict[str, Any]]:
        """The draft to train, in float32, and its config.json."""
        plan = self.plan
        if plan.init is not None:
            directory = resolve(plan.init, draft=True)
            draft = load_draft(directory)
            if isinstance(draft, DFlash2Draft):
                raise DFlashError(f"{plan.init} is a DFlash 2 draft; training knows DFlash 1 only.")
            if is_quantized(draft):
                raise DFlashError(
                    f"{plan.init} is quantized, and what is quantized cannot be trained; go on "
                    "from the draft it was made of, or dequantize it with dflash-mlx convert."
                )
            check_pair(self.view, draft)
            draft.set_dtype(mx.float32)
            draft.train()
            config = read_config(directory)
        else:
            config = design_draft(
                self.view,
                target,
                self.tokenizer,
                layers=5 if plan.draft_layers is None else plan.draft_layers,
                block_size=16 if plan.block_size is None else plan.block_size,
                taps=plan.taps,
            )
            draft = new_draft(config, final_norm(self.view), plan.seed)
        if draft.block_size > plan.seq_length:
            raise DFlashError(
                f"A block of {draft.block_size} tokens is longer than a sequence of "
                f"{plan.seq_length}; raise seq_length or lower block_size."
            )
        return draft, config

    def _samples(
        self, rows: Sequence[Row], target: Path, draft: DFlashDraft | None, stage: Stage
    ) -> tuple[list[Sample], list[str]]:
        """The sequences to learn from, and remarks on them."""
        plan = self.plan
        template = Template(self.tokenizer, think=plan.think)
        count = min(plan.regenerate, len(rows))
        asked = encode_rows(rows[:count], template, plan.seq_length, unanswered=True)
        given = encode_rows(rows[count:], template, plan.seq_length)
        for sample in (*asked.samples, *given.samples):
            self.view.check_tokens(sample.tokens.tolist())
        samples, remarks = asked.samples, []
        if samples:
            adapter = [Path(plan.adapter_path)] if plan.adapter_path else []
            store = answer_file([target, *adapter], samples, plan.seq_length)
            what = "The target is answering"
            samples = answered(
                samples,
                Author(self.view, self.tokenizer, draft),
                plan.seq_length,
                store,
                lambda done, total: stage(what, done, total),
            )
            remarks.append(f"The target's {len(samples)} answers are kept in {store}.")
        samples = samples + given.samples
        cut = asked.shortened + given.shortened
        if cut:
            remarks.append(f"Cut at {plan.seq_length} tokens: {cut} of the conversations.")
        able = [sample for sample in samples if can_teach(sample)]
        if len(able) < len(samples):
            few = len(samples) - len(able)
            remarks.append(f"Left out, as they hold too little to learn: {few} sequences.")
        if len(able) < 2:
            raise DFlashError(
                f"{plan.data} gives {len(able)} sequence{'' if len(able) == 1 else 's'} to learn "
                "from; at least 2 are needed, as one is held out to measure on. Give more text, "
                "or shorter sequences."
            )
        return able, remarks

    def _log(self, report: StepReport) -> None:
        self.directory.append(
            {
                "step": report.step,
                "loss": report.loss,
                "learning_rate": self.plan.learning_rate_at(report.step - 1),
                "tokens": report.tokens,
                "seconds": round(report.seconds, 4),
                "right": report.right.tolist(),
                "seen": report.seen.tolist(),
                "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
            }
        )

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Says which options to lower when memory runs out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
                raise
            plan = self.plan
            raise DFlashError(
                f"Memory ran out in step {self.trainer.step_count + 1} ({said(error)}); "
                f"lower --batch-size (now {plan.batch_size}), --anchors (now {plan.anchors}) or "
                f"--seq-length (now {plan.seq_length}), in this order."
            ) from error


def train(target: str | Path, data: str | Path, output: str | Path, **options: Any) -> Evaluation:
    """Train a draft to the last step, and return the last evaluation.

    Args:
        target: directory or hub id.
        data: a .jsonl or .txt file.
        output: the draft's new directory.
        options: the other fields of `Plan`, and the keyword arguments of `Training`.

    Raises:
        DFlashError: see `Training` and its `run`.
    """
    planned = {f.name: options.pop(f.name) for f in fields(Plan) if f.name in options}
    plan = Plan(target=str(target), data=Path(data), **planned)
    training = Training(plan, Path(output), **options)
    for _ in training.run():
        pass
    return training.evaluation or training.evaluate()


def final_norm(view: TargetView) -> mx.array | None:
    """The weight of a target's last norm [H], where one is found as the module `norm`."""
    for name, module in view.model.named_modules():
        weight = module.get("weight") if name.split(".")[-1] == "norm" else None
        if isinstance(weight, mx.array) and weight.shape == (view.hidden_size,):
            return weight
    return None


def _split(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Held-out samples and the rest, the same for the same seed."""
    order = list(range(len(samples)))
    random.Random(f"held out/{seed}").shuffle(order)
    count = min(HELD_OUT, max(1, len(samples) // 10))
    held_out, rest = sorted(order[:count]), sorted(order[count:])
    return [samples[i] for i in held_out], [samples[i] for i in rest]
