"""dflash-mlx train: a draft for a target, from one's own texts."""

import os
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dflash_mlx.cli.options import AdapterPath, Revision, TrustRemoteCode, place
from dflash_mlx.cli.patience import Patience
from dflash_mlx.cli.screen import digits, err, many, note, out
from dflash_mlx.errors import DFlashError
from dflash_mlx.training.evaluation import Evaluation
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.run import Training
from dflash_mlx.training.trainer import StepReport

_DATA, _DRAFT, _STEPS = "Target and data", "Draft", "Training"
USEFUL = 1.5  # acceptance length below which drafting pays on hardly any machine
DEFAULT = Plan(target="", data=Path())


def taps(value: str | tuple[int, ...]) -> tuple[int, ...]:
    """`auto`, which is no taps, or layers like 1,5,9."""
    if isinstance(value, tuple):
        return value
    if value == "auto":
        return ()
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is neither auto nor layers like 1,5,9.") from error


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def train(
    target: Annotated[
        str,
        _option(
            _DATA,
            "The target: a directory or a hub id; demo is the one that comes with dflash-mlx.",
            "--target",
            "-m",
        ),
    ],
    data: Annotated[
        Path,
        _option(
            _DATA,
            'A .jsonl or .json file of rows: {"messages": […]}, {"conversations": […]} as in '
            'ShareGPT, {"prompt": …, "completion": …} or {"text": …}; or a .txt file.',
        ),
    ],
    output: Annotated[
        Path, _option(_DATA, "The draft's directory.", "--output", "-o", metavar="DIR")
    ],
    regenerate: Annotated[
        int,
        _option(
            _DATA,
            "Let the target itself answer so many rows first: a draft learns most from "
            "its own text.",
            min=0,
        ),
    ] = DEFAULT.regenerate,
    skip_bad_rows: Annotated[
        bool,
        _option(
            _DATA,
            "Leave out rows that cannot be used and say how many, instead of ending with the "
            "first.",
            "--skip-bad-rows",
        ),
    ] = DEFAULT.skip_bad_rows,
    think: Annotated[
        bool | None,
        _option(
            _DATA,
            "Let the target think in these answers, or not. Without it, as its chat "
            "template has it.",
            "--think/--no-think",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    adapter_path: AdapterPath = None,
    trust_remote_code: TrustRemoteCode = False,
    init: Annotated[
        str | None,
        _option(
            _DRAFT,
            "Go on from this draft, a directory or a hub id, instead of a new one; "
            "demo is the one that comes with dflash-mlx.",
            metavar="DRAFT",
            show_default=False,
        ),
    ] = None,
    draft_layers: Annotated[
        int | None,
        _option(_DRAFT, "Layers of a new draft; 5 if not given.", min=1, show_default=False),
    ] = None,
    block_size: Annotated[
        int | None,
        _option(
            _DRAFT,
            "Block of a new draft, the anchor counted; 16 if not given.",
            min=2,
            show_default=False,
        ),
    ] = None,
    tap_ids: Annotated[
        Any,
        _option(
            _DRAFT,
            "Target layers that a new draft looks at: auto spreads five evenly.",
            "--taps",
            metavar="auto|IDS",
            parser=taps,
        ),
    ] = "auto",
    mask_token: Annotated[
        str | None,
        _option(
            _DRAFT,
            "The token, or its id, that a new draft's blocks are masked with; without it, the "
            "tokenizer's mask or one that no text holds.",
            metavar="TOKEN",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        _option(
            _STEPS,
            "Optimizer steps; 2000 if not given. With --resume, more of them lengthen the run.",
            min=1,
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        _option(
            _STEPS,
            "Instead of --steps: as many as fit into so many minutes, answering included.",
            min=0.1,
            show_default=False,
        ),
    ] = None,
    keep_features: Annotated[
        float,
        _option(
            _STEPS,
            "Gigabytes of disk for what the target makes of the data, computed once instead of in "
            "every round through it; deleted at the end.",
            min=0.0,
        ),
    ] = DEFAULT.keep_features / (1 << 30),
    batch_size: Annotated[
        int,
        _option(_STEPS, "Sequences of full length in a step; of shorter ones as many more.", min=1),
    ] = DEFAULT.batch_size,
    seq_length: Annotated[
        int, _option(_STEPS, "Tokens of a sequence.", min=4)
    ] = DEFAULT.seq_length,
    anchors: Annotated[
        int,
        _option(
            _STEPS,
            "Blocks drawn from a sequence of full length; of shorter ones as many fewer.",
            min=1,
        ),
    ] = DEFAULT.anchors,
    lr: Annotated[float, _option(_STEPS, "Highest learning rate.", min=0.0)] = DEFAULT.lr,
    warmup: Annotated[int, _option(_STEPS, "Steps until it is reached.", min=0)] = DEFAULT.warmup,
    gamma: Annotated[
        float | None,
        _option(
            _STEPS,
            "Row k of a block weighs exp(-(k - 1) / gamma) in the loss; without it, what it adds "
            "to the expected acceptance so far.",
            min=0.0,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, _option(_STEPS, "Seed of weights, order and anchors.", min=0, max=2**64 - 1)
    ] = DEFAULT.seed,
    eval_every: Annotated[
        int, _option(_STEPS, "Steps between two measurements on held-out prompts.", min=1)
    ] = 250,
    save_every: Annotated[int, _option(_STEPS, "Steps between two saves.", min=1)] = 250,
    resume: Annotated[
        bool,
        _option(
            _STEPS,
            "Go on with the run in the output directory, exactly where it stopped.",
            "--resume",
        ),
    ] = False,
) -> None:
    """Train a draft for a target, on the target's own answers or on your texts.

    Ctrl-C saves and leaves; the same command with --resume goes on. The output is a draft like a
    published one at every save: give it to --draft.
    """
    plan = Plan(
        target=place(target),
        data=data,
        draft_layers=draft_layers,
        block_size=block_size,
        taps=tap_ids or None,
        mask_token=mask_token,
        steps=steps,
        minutes=minutes,
        keep_features=int(keep_features * (1 << 30)),
        batch_size=batch_size,
        seq_length=seq_length,
        anchors=anchors,
        lr=lr,
        warmup=warmup,
        gamma=gamma,
        seed=seed,
        init=None if init is None else place(init, draft=True),
        regenerate=regenerate,
        think=think,
        skip_bad_rows=skip_bad_rows,
        revision=revision,
        adapter_path=adapter_path,
    )
    training: Training | None = None
    screen = TrainingScreen()

    def leave(step: int | None) -> None:
        screen.bar.stop()
        note(farewell(step))
        sys.stderr.flush()
        os._exit(130)

    def overdue() -> None:
        if training is None:
            leave(None)
        else:
            with suppress(DFlashError):  # the main thread will meet the same, and say it
                training.abandon(leave)

    with screen, Patience(overdue):
        try:
            training = Training(
                plan,
                output,
                resume=resume,
                eval_every=eval_every,
                save_every=save_every,
                trust_remote_code=trust_remote_code,
                stage=screen.stage,
                say=note,
            )
            screen.begin(training)
            for event in training.run():
                screen.show(event)
        except KeyboardInterrupt:
            note(farewell(None if training is None else training.trainer.step_count))
            raise
    if training.evaluation is not None:
        for line in verdict(training):
            note(line)
    out.print(f"The draft is in {output}", markup=False, soft_wrap=True)


def farewell(step: int | None) -> str:
    """What a run says that was stopped after a step, or before there were any."""
    if step is None:
        return "Stopped before the first step; what the target has answered is kept."
    return f"Stopped and saved after step {step}; the same command with --resume goes on."


class TrainingScreen:
    """What a run looks like: a live line below, and a line for every evaluation above it.

    Where no one watches there is no live line, and a line of figures every minute instead.
    """

    EVERY = 60.0  # seconds between two lines where no one watches

    def __init__(self) -> None:
        self.steps = 0
        self.spoke = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self.task = self.bar.add_task("", total=None)
        self.recent: deque[StepReport] = deque(maxlen=50)
        self.said = self.length = ""

    def __enter__(self) -> "TrainingScreen":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def stage(self, what: str, done: int, total: int) -> None:
        """What is done before the first step, and between steps."""
        self.bar.update(self.task, description=what, completed=done, total=total or None)
        if err.is_terminal:
            return
        if what != self.said and not self.steps:
            note(what)
        elif self._due():
            note(f"{what}: {done} of {total}")
        self.said = what

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self.spoke < self.EVERY:
            return False
        self.spoke = now
        return True

    def begin(self, training: Training) -> None:
        """The data is read and the first step comes."""
        for remark in training.remarks:
            note(remark)
        count, held_out = len(training.trainer.samples), len(training.held_out)
        draft = training.trainer.draft
        note(
            f"{count} sequences to learn from, {held_out} held out; the draft has "
            f"{many(len(draft.layers), 'layer')}, blocks of {draft.block_size}, taps "
            f"{', '.join(map(str, draft.target_layer_ids))}"
        )
        done = training.trainer.step_count
        if done:
            note(f"Going on after step {done}")
        self.steps = training.plan.total_steps
        self.bar.reset(self.task, description="", total=self.steps, completed=done)

    def show(self, event: StepReport | Evaluation) -> None:
        """A step or an evaluation."""
        if isinstance(event, Evaluation):
            self.length = f", acceptance length {event.acceptance_length:.2f}"
            err.print(evaluation_line(event), markup=False, soft_wrap=True)
            return
        self.recent.append(event)
        line = step_line(self.recent) + self.length
        self.bar.update(self.task, completed=event.step, total=self.steps, description=line)
        if not err.is_terminal and (self._due() or event.step == self.steps):
            left = (self.steps - event.step) * sum(r.seconds for r in self.recent)
            minutes = left / len(self.recent) / 60
            note(f"step {event.step}: {line}, {minutes:.0f} min left")


def verdict(training: Training) -> list[str]:
    """What the last measurement means, where the draft is not yet worth using."""
    log = training.directory.evaluations()
    last = log[-1]
    if last.acceptance_length >= USEFUL:
        return []
    right = last.accuracy[0] if last.accuracy else 0.0
    lines = [
        f"This draft is of little use yet: {right:.0%} of its first proposals are right, "
        f"acceptance length {last.acceptance_length:.2f}."
    ]
    if len(log) > 1:
        before = log[-2]
        lines.append(
            f"The last {last.step - before.step} steps took it from "
            f"{before.acceptance_length:.2f} to {last.acceptance_length:.2f}; --resume with more "
            "--steps goes on."
        )
    else:
        lines.append("--resume with more --steps goes on.")
    return lines


def step_line(recent: "deque[StepReport]") -> str:
    """Mean loss, speed and memory over the latest steps."""
    loss = sum(report.loss for report in recent) / len(recent)
    speed = sum(report.tokens for report in recent) / sum(report.seconds for report in recent)
    memory = mx.get_peak_memory() / 1e9
    return f"loss {loss:.3f}, {digits(speed)} tokens/s, peak {memory:.2f} GB"


def evaluation_line(evaluation: Evaluation) -> str:
    """Acceptance length, and how often each place of a block was right."""
    places = " ".join(f"{share:.0%}".rstrip("%") for share in evaluation.accuracy)
    return (
        f"step {evaluation.step}: acceptance length {evaluation.acceptance_length:.2f} on held-out "
        f"prompts; right by place of the block, %: {places}"
    )
