"""dflash-mlx train: from a user's file to a draft that every other command takes."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from dflash_mlx import load_draft
from dflash_mlx.cli.train import TrainingScreen
from dflash_mlx.demo import demo_paths
from dflash_mlx.demo.making.text import example
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.errors import DFlashError
from dflash_mlx.training import Evaluation, Plan, Training, train
from dflash_mlx.training.estimate import duration
from tests import tiny_pair
from tests.command_line import run
from tests.train.runs import (
    OPTIONS,
    QUESTIONS,
    SMALL,
    WHOLE,
    conversation,
    files,
    log,
    weights,
    write_rows,
)


def test_the_command_trains_a_draft_that_the_others_take(
    target: Path, data: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    arguments = [f"--target={target}", f"--data={data}", f"-o{made}", "--lr=0.01", *OPTIONS]
    result = run(
        "train", *arguments, "--steps=120", "--regenerate=8", "--eval-every=60", "--save-every=50"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"The draft is in {made}"]
    assert files(made) == WHOLE
    first, last = log(made, "acceptance_length")
    assert last > max(first - 0.2, 3)  # the sentence can be learnt
    assert log(made, "step") == [*range(1, 61), 60, *range(61, 121), 120]
    assert f"step 120: acceptance length {last:.2f} on held-out prompts" in result.stderr
    assert "step 120: loss" in result.stderr
    config = draft_config(json.loads((made / "config.json").read_text()))
    assert (config.num_hidden_layers, config.block_size, config.num_target_layers) == (1, 4, 4)
    assert f"| Acceptance length, step 120 | {last:.2f} " in (made / "README.md").read_text()

    written = run("generate", "-m", str(target), "--draft", str(made), "-p", "Hi")
    assert written.exit_code == 0
    assert written.stdout.strip() == tiny_pair.SENTENCE
    half = run("convert", str(made), "-o", str(tmp_path / "half"), "--bits=8", "--group-size=32")
    assert half.exit_code == 0
    assert load_draft(tmp_path / "half").fc.bits == 8


@pytest.mark.parametrize("seconds_a_step", [20, 70])
def test_without_a_terminal_there_is_a_line_a_minute(
    seconds_a_step: int, target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the screen's own, which every step moves on."""
    now, show = [0.0], TrainingScreen.show

    def shown(screen: TrainingScreen, event: Any) -> None:
        now[0] += seconds_a_step * (not isinstance(event, Evaluation))
        show(screen, event)

    monkeypatch.setattr(TrainingScreen, "show", shown)
    module = sys.modules[TrainingScreen.__module__]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    arguments = [f"--target={target}", f"--data={data}", f"-o{tmp_path / 'made'}", *OPTIONS]
    result = run("train", *arguments, "--steps=7", "--eval-every=7")
    assert result.exit_code == 0, result.output
    said = re.findall(r"^step (\d+): loss .* min left$", result.stderr, re.MULTILINE)
    assert said == (["3", "6", "7"] if seconds_a_step == 20 else [*"1234567"])


def test_python_trains_as_the_command_does(target: Path, data: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    evaluation = train(target, data, one, steps=3, seed=5, **SMALL)
    assert isinstance(evaluation, Evaluation)
    assert evaluation.step == 3
    assert len(evaluation.accuracy) == 3
    arguments = [f"--target={target}", f"--data={data}", f"-o{other}", *OPTIONS]
    assert run("train", *arguments, "--steps=3", "--seed=5").exit_code == 0
    assert log(one) == log(other)
    assert all(mx.array_equal(weights(other)[name], w) for name, w in weights(one).items())
    train(target, data, tmp_path / "third", steps=3, seed=6, **SMALL)
    assert log(tmp_path / "third") != log(one)


def test_minutes_decide_how_many_steps_there_are(target: Path, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = {**SMALL, "minutes": 0.2, "regenerate": 8}
    plan = Plan(str(target), data, **options)
    training = Training(plan, tmp_path / "made", say=said.append)
    assert training.plan.total_steps >= 10
    assert f"{training.plan.total_steps} steps fit into what is left of 0.2 minutes." in said
    assert any(line.startswith("A step takes ") for line in said)
    with pytest.raises(DFlashError, match=r"not even ten fit into the minutes that are left"):
        Training(Plan(str(target), data, **SMALL, minutes=1e-6), tmp_path / "other")
    with pytest.raises(DFlashError, match=r"give one of the two"):
        Training(Plan(str(target), data, **SMALL, minutes=1, steps=3), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_says_beforehand_what_it_will_take(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    options: dict[str, Any] = {**SMALL, "regenerate": 8}
    Training(Plan(str(target), data, steps=50, **options), tmp_path / "made", say=said.append)
    (line,) = said
    assert re.fullmatch(
        r"Estimated from a few of each: answers, at most .+, steps .+, measuring, at most .+\.",
        line,
    )
    assert [duration(s) for s in (5, 100, 5400, 7200, 12000, 400000)] == [
        "5 s",
        "2 min",
        "1 h 30 min",
        "2 h",
        "3 h 20 min",
        "5 days",
    ]


def test_measuring_stops_when_its_time_is_over(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [conversation(q, "No idea.") for q in QUESTIONS] * 4
    many = write_rows(tmp_path / "many.jsonl", rows)
    training = Training(Plan(str(target), many, steps=1, **SMALL), tmp_path / "made")
    assert len(training.held_out) > 2
    whole = training.evaluate()
    monkeypatch.setattr("dflash_mlx.training.run.MEASURING_SECONDS", 0.0)
    short = training.evaluate()
    assert 0 < short.tokens <= 2 < whole.tokens
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1

    training.evaluate(100.0, check)
    assert checks > len(training.held_out)


def test_a_useless_draft_is_said_to_be_one(wordy: Path, data: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    arguments = [f"--target={wordy}", f"--data={data}", f"-o{made}", *OPTIONS, "--eval-every=1"]
    result = run("train", *arguments, "--steps=2")
    assert result.exit_code == 0, result.output
    assert "This draft is of little use yet: " in result.stderr
    assert "The last 1 steps took it from " in result.stderr


def test_a_draft_is_fine_tuned_on_ones_own_text(tmp_path: Path) -> None:
    rows = [{"messages": list(example("record", "train", i).messages)} for i in range(40)]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    made = tmp_path / "made"
    arguments = ["--target=demo", f"--data={file}", "--init=demo", f"-o{made}", "--lr=1e-4"]
    result = run(
        "train", *arguments, "--steps=3", "--regenerate=40", "--batch-size=2", "--warmup=1"
    )
    assert result.exit_code == 0, result.output
    assert log(made, "acceptance_length")[0] > 6  # it began as the demo draft
    before = weights(demo_paths()[1])
    assert not all(mx.array_equal(before[name], w) for name, w in weights(made).items())
    assert all(mx.allclose(before[name], w, atol=0.05) for name, w in weights(made).items())
    assert json.loads((made / "config.json").read_text()) == json.loads(
        (demo_paths()[1] / "config.json").read_text()
    )
