"""Train a draft from a user's texts: everything from the files to the finished directory."""

import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.conversation.template import Template
from dflash_mlx.decode.interrupts import Interrupts
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.dtype import is_quantized
from dflash_mlx.errors import DFlashError, said
from dflash_mlx.pairs import check_pair
from dflash_mlx.repository import read_config, resolve
from dflash_mlx.target import TargetView
from dflash_mlx.target_checkpoint import load_target
from dflash_mlx.training.answer_store import AnswerStore
from dflash_mlx.training.answers import Author, answered
from dflash_mlx.training.batches import Sample
from dflash_mlx.training.card import training_card
from dflash_mlx.training.data import BadRows, can_teach, encode_rows, read_rows
from dflash_mlx.training.design import design_draft
from dflash_mlx.training.directory import TrainingDirectory
from dflash_mlx.training.estimate import Estimate, duration
from dflash_mlx.training.evaluation import Evaluation, acceptance_length
from dflash_mlx.training.features import FeatureStore
from dflash_mlx.training.mask import mask_tokens
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.state import State
from dflash_mlx.training.trainer import (
    FrozenTarget,
    StepReport,
    Trainer,
    new_draft,
)

HELD_OUT = 32  # sequences, or a tenth where there are few
MEASURING_SHARE = 0.1  # of the time between two evaluations that one may take,
MEASURING_SECONDS = 20.0  # and what it may take however short that time is
ANSWERING_SHARE = 0.5  # of the minutes allowed that the target's answers may take
TIMED = 4  # answers that are timed, as several are written at once
NORM_SCALES = (1.0, 0.5, 0.25, 0.125)  # of the target's final norm, tried on the first batch
MASKS = 4  # tokens tried there as mask, at most
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
        say: Callable[[str], None] = lambda line: None,
    ):
        """Load, read and answer what the plan names.

        Args:
            plan: see there.
            output: the new draft's directory, or with `resume` that of the run to go on with.
            resume: go on exactly where the run in `output` stopped; more `steps` lengthen it.
            eval_every, save_every: steps between two; the last step is always both.
            trust_remote_code: of the target, as in `load`.
            stage: called with what is being done now, how much of it is done, and of how much.
            say: called with a line that the user should read before it goes on.

        Raises:
            DFlashError: the plan cannot be; the data cannot be read or is too little; the target
                cannot be tapped; the output exists, or holds no run to resume.
        """
        began = time.monotonic()
        plan.check()
        for name, value in (("eval_every", eval_every), ("save_every", save_every)):
            if value < 1:
                raise DFlashError(f"{name} is {value}; give at least 1.")
        bad = BadRows(plan.skip_bad_rows)
        rows = read_rows(plan.data, bad)
        self.directory = TrainingDirectory(output)
        self.eval_every, self.save_every, self._stage = eval_every, save_every, stage
        saved = False
        if resume:
            plan, saved = self.directory.resume(plan)
        else:
            self.directory.check_new()
        self.plan = plan

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
        frozen = FrozenTarget.of(self.view, draft.target_layer_ids)

        stage("Reading the data", 0, 0)
        template = Template(self.tokenizer, think=plan.think)
        count = min(plan.regenerate, len(rows))
        asked = encode_rows(rows[:count], template, plan.seq_length, unanswered=True, bad=bad)
        given = encode_rows(rows[count:], template, plan.seq_length, bad=bad)
        if bad.remark:
            say(bad.remark)
        _check_some(asked.samples + given.samples, plan)
        for sample in (*asked.samples, *given.samples):
            self.view.check_tokens(sample.tokens.tolist())
        stage("Timing a step", 0, 0)
        with self._memory(1):
            each = Trainer(draft, frozen, asked.samples + given.samples, plan).seconds_per_step()
        answers, self.remarks = self._answers(
            asked.samples, target, draft if plan.init else None, each, began, say
        )
        samples = self._able(answers + given.samples, asked.shortened + given.shortened)
        self.held_out, samples = _split(samples, plan.seed)
        if plan.minutes is not None:
            left = 60 * plan.minutes - (time.monotonic() - began)
            self.plan = plan = plan.within(left, each * (1 + MEASURING_SHARE))
            say(f"{plan.steps} steps fit into what is left of {plan.minutes:g} minutes.")

        room = min(plan.keep_features, shutil.disk_usage(_existing(output)).free // 2)
        rounds = plan.total_steps * plan.batch_size * plan.seq_length
        keeps = rounds > sum(len(sample.tokens) for sample in samples)
        store = self.directory.features
        self._store = FeatureStore(store, samples, frozen.features, room) if keeps else None
        self.trainer = Trainer(draft, frozen, samples, plan, self._store)
        if saved:
            self.trainer.restore(self.directory.state)
            if plan.init is None:
                self._mask_with(read_config(output)["dflash_config"]["mask_token_id"])
        elif plan.init is None:
            with self._memory(1):
                self.remarks += self._start_low()
        if resume:
            self.directory.rewind_log(self.trainer.step_count)
        else:
            self.directory.begin(self.plan)
        self.evaluation: Evaluation | None = None
        self._saving = threading.Lock()

    def run(self) -> Iterator[Event]:
        """Train to the last step, and say how each step and each evaluation went.

        Ctrl-C is honoured between the sequences of a step, which is then not done: it saves, and
        leaves as KeyboardInterrupt.

        Raises:
            DFlashError: memory ran out, or the output cannot be written.
        """
        interrupts, steps, trained = Interrupts(), self.plan.total_steps, 0.0
        self.trainer.hold()
        try:
            with interrupts:
                while self.trainer.step_count < steps:
                    interrupts.check()
                    with self._memory(self.trainer.step_count + 1):
                        report = self.trainer.step(interrupts.check)
                    self._log(report)
                    self.trainer.hold()
                    trained += report.seconds
                    yield report
                    last = report.step == steps
                    if last or report.step % self.save_every == 0:
                        self.save()
                    if last or report.step % self.eval_every == 0:
                        with self._memory(report.step):
                            self.evaluation = self.evaluate(trained, interrupts.check)
                        trained = 0.0
                        self.directory.append(asdict(self.evaluation))
                        if last:
                            self.directory.write_card(self._card())
                        yield self.evaluation
            if self._store is not None:
                self._store.remove()
        except KeyboardInterrupt:
            self.trainer.held = None  # saved here
            self.save()
            raise

    def evaluate(
        self, trained: float = 0.0, check: Callable[[], None] = lambda: None
    ) -> Evaluation:
        """The draft as it is now, on the held-out sequences, or on as many as the time allows.

        Args:
            trained: seconds since the last evaluation.
            check: called between prompts.
        """
        allowed = max(MEASURING_SECONDS, MEASURING_SHARE * trained)
        began = time.monotonic()

        def over(share: float) -> bool:
            check()
            return time.monotonic() - began > share * allowed

        trainer = self.trainer
        self._stage("Measuring: proposals right", 0, 0)
        accuracy = trainer.accuracy(self.held_out, lambda: over(0.5))
        length, tokens = acceptance_length(
            self.view,
            self.tokenizer,
            trainer.draft,
            self.held_out,
            lambda done, total: self._stage("Measuring: acceptance length", done, total),
            lambda: over(1.0),
        )
        return Evaluation(trainer.step_count, length, tokens, accuracy)

    def save(self) -> None:
        """Write the draft, as published ones are, and the run's state."""
        with self._saving:
            self._save(self.trainer.state())

    def abandon(self, leave: Callable[[int], None]) -> None:
        """Save what the last finished step made, from another thread, and leave.

        For a run whose thread is in a computation that is too long to wait for. Does nothing where
        it is in the middle of an update, or about to save by itself.

        Args:
            leave: called with the step that was saved; must end the process, as the run would go
                on. Nothing of the run is being written while it does.

        Raises:
            DFlashError: the output cannot be written.
        """
        with self._saving:
            if (state := self.trainer.held) is not None:
                self._save(state)
                leave(state.step)

    def _save(self, state: State) -> None:
        self.directory.save(state, self.config, self._dtype, self._card())

    def _card(self) -> str:
        return training_card(self.directory.path.name, self.plan, self.trainer, self.evaluation)

    def _draft(self, target: dict[str, Any]) -> tuple[DFlashDraft, dict[str, Any]]:
        """The draft to train, in float32, and its config.json."""
        plan = self.plan
        if plan.init is not None:
            directory = resolve(plan.init, draft=True)
            draft = load_draft(directory)
            if not draft.config.is_dflash1:
                raise DFlashError(
                    f"{plan.init} is a draft of the format {draft.config.packaging}; training "
                    "knows DFlash 1 only."
                )
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
                mask=plan.mask_token,
            )
            draft = new_draft(config, final_norm(self.view), plan.seed)
        if draft.block_size > plan.seq_length:
            raise DFlashError(
                f"A block of {draft.block_size} tokens is longer than a sequence of "
                f"{plan.seq_length}; raise seq_length or lower block_size."
            )
        return draft, config

    def _answers(
        self,
        asked: list[Sample],
        target: Path,
        draft: DFlashDraft | None,
        step: float,
        began: float,
        say: Callable[[str], None],
    ) -> tuple[list[Sample], list[str]]:
        """The target's answers, and remarks on them; first what the whole run will take."""
        plan, stage = self.plan, self._stage
        adapter = [Path(plan.adapter_path)] if plan.adapter_path else []
        store = AnswerStore.of([target, *adapter], plan.seq_length)
        author = Author(self.view, self.tokenizer, draft)
        new = [sample for sample in asked if store.get(sample) is None]
        one = 0.0
        if new:
            stage("Timing an answer", 0, 0)
            start = time.monotonic()
            some = new[len(new) // 2 :][:TIMED]
            answered(some, author, store, lambda done, total: None)
            one = (time.monotonic() - start) / len(some)
        steps = plan.total_steps
        count = -(-steps // self.eval_every)
        measuring = max(MEASURING_SECONDS * count, MEASURING_SHARE * step * steps)
        if plan.minutes is None:
            say(str(Estimate(one * max(len(new) - TIMED, 0), step * steps, measuring)))
        else:
            say(
                f"A step takes {duration(step)}" + (f", an answer {duration(one)}." if new else ".")
            )
        if not asked:
            return [], []
        allowed = 60 * plan.minutes * ANSWERING_SHARE if plan.minutes else float("inf")
        found = answered(
            asked,
            author,
            store,
            lambda done, total: stage("The target is answering", done, total),
            lambda: time.monotonic() - began > allowed,
        )
        answers = [sample for sample in found if sample is not None]
        remarks = [f"The target's {len(answers)} answers are kept in {store.file}."]
        if len(answers) < len(asked):
            remarks.append(f"No time to answer {len(asked) - len(answers)} more rows: left out.")
        return answers, remarks

    def _able(self, samples: Sequence[Sample], cut: int) -> list[Sample]:
        """The samples that teach something; remarks on the others."""
        plan = self.plan
        if cut:
            self.remarks.append(f"Cut at {plan.seq_length} tokens: {cut} of the conversations.")
        able = [sample for sample in samples if can_teach(sample)]
        if len(able) < len(samples):
            few = len(samples) - len(able)
            self.remarks.append(f"Left out, as they hold too little to learn: {few} sequences.")
        _check_some(able, plan)
        return able

    def _start_low(self) -> list[str]:
        """Scale the copied final norm, then choose the mask, so that the first loss is lowest.

        A target whose embedding is its head makes states of full size predict the mask itself.
        """
        norm = self.trainer.draft.norm
        whole, losses = mx.array(norm.weight), {}
        for scale in NORM_SCALES:
            norm.weight = whole * scale
            losses[scale] = self.trainer.first_loss()
        best = min(losses, key=lambda scale: losses[scale])
        norm.weight = whole * best
        mx.eval(norm.weight)
        lowest, mask = losses[best], self.trainer.draft.config.mask_token_id
        if self.plan.mask_token is None:
            for other in islice(mask_tokens(self.view.vocab_size, self.tokenizer), MASKS):
                self._mask_with(other)
                if other != mask and (loss := self.trainer.first_loss()) < lowest:
                    lowest, mask = loss, other
            self._mask_with(mask)
        return [
            f"First loss {lowest:.2f}, with {best:g} times the target's final norm, masked with "
            f"token {mask}."
        ]

    def _mask_with(self, token: int) -> None:
        """Let the draft's blocks be masked with another token."""
        draft = self.trainer.draft
        draft.config = replace(draft.config, mask_token_id=token)
        self.config["dflash_config"] = {**self.config["dflash_config"], "mask_token_id": token}

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
    def _memory(self, step: int) -> Iterator[None]:
        """Says which options to lower when memory runs out in a step."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
                raise
            plan = self.plan
            raise DFlashError(
                f"Memory ran out in step {step} ({said(error)}); "
                f"lower --batch-size (now {plan.batch_size}), --anchors (now {plan.anchors}) or "
                f"--seq-length (now {plan.seq_length}), in this order."
            ) from error


def train(target: str | Path, data: str | Path, output: str | Path, **options: Any) -> Evaluation:
    """Train a draft to the last step, and return the last evaluation.

    Args:
        target: directory or hub id.
        data: a .jsonl, .json or .txt file.
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


def _check_some(samples: Sequence[Sample], plan: Plan) -> None:
    if len(samples) < 2:
        raise DFlashError(
            f"{plan.data} gives {len(samples)} sequence{'' if len(samples) == 1 else 's'} to learn "
            "from; at least 2 are needed, as one is held out to measure on. Give more text, "
            "or shorter sequences."
        )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _split(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Held-out samples and the rest, the same for the same seed."""
    order = list(range(len(samples)))
    random.Random(f"held out/{seed}").shuffle(order)
    count = min(HELD_OUT, max(1, len(samples) // 10))
    held_out, rest = sorted(order[:count]), sorted(order[count:])
    return [samples[i] for i in held_out], [samples[i] for i in rest]
