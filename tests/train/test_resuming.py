"""A run that stopped, was cut off or is over goes on as if it had not."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from typing import Any

import mlx.core as mx
import pytest

from dflash_mlx import load_draft
from dflash_mlx.errors import DFlashError
from dflash_mlx.training import Evaluation, Plan, Training, train
from tests.command_line import run, spawn
from tests.train.runs import (
    OPTIONS,
    SMALL,
    WHOLE,
    conversation,
    files,
    log,
    weights,
    write_rows,
)


def test_an_interrupted_run_goes_on_exactly_where_it_stopped(
    target: Path, data: Path, tmp_path: Path
) -> None:
    arguments = [f"--target={target}", f"--data={data}", "--steps=400", *OPTIONS]
    arguments += ["--eval-every=400", "--save-every=400"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train", *arguments, f"-o{whole}").exit_code == 0
    process = spawn(["train", *arguments, f"-o{parts}"], stderr=subprocess.PIPE, text=True)
    while not (parts / "training/log.jsonl").exists() or len(log(parts)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    done = len(log(parts))
    assert process.returncode == 130, said
    assert 5 <= done < 400
    assert f"Stopped and saved after step {done}; the same command with --resume goes on." in said
    assert "Traceback" not in said
    load_draft(parts)
    # What is logged after the last save comes again.
    with open(parts / "training/log.jsonl", "a") as out:
        out.write(json.dumps({"step": done + 1, "loss": 0.0}) + "\n" + '{"step": 7')
    assert run("train", *arguments, f"-o{parts}", "--resume").exit_code == 0
    assert log(parts) == log(whole)
    assert log(parts, "acceptance_length") == log(whole, "acceptance_length")
    assert all(mx.array_equal(weights(parts)[name], w) for name, w in weights(whole).items())
    assert files(parts) == WHOLE


def test_a_run_is_resumed_as_it_was_begun(target: Path, data: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    train(target, data, made, steps=2, **SMALL)
    with pytest.raises(DFlashError, match=r"exists already; --resume goes on"):
        train(target, data, made, steps=2, **SMALL)
    with pytest.raises(DFlashError, match=r"has seed 0 and not 1; resume it with the options"):
        train(target, data, made, steps=2, seed=1, resume=True, **SMALL)
    write_rows(data, [conversation("Hi", "Ho")] * 3)
    with pytest.raises(DFlashError, match=r"The data has changed since the run"):
        train(target, data, made, steps=2, resume=True, **SMALL)
    with pytest.raises(DFlashError, match=r"holds no training run to resume"):
        train(target, data, tmp_path / "none", steps=2, resume=True, **SMALL)


def test_a_run_can_be_made_longer(target: Path, data: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    train(target, data, made, steps=4, **SMALL)
    again = train(target, data, made, resume=True, **SMALL)  # as long as it was: nothing to do
    assert again.step == 4
    evaluation = train(target, data, made, steps=7, resume=True, **SMALL)
    assert evaluation.step == 7
    assert log(made, "step") == [1, 2, 3, 4, 4, 5, 6, 7, 7]
    assert "| Steps | 7 of 7 |" in (made / "README.md").read_text()
    assert train(target, data, made, resume=True, **SMALL).step == 7


def test_what_was_trained_is_saved_before_it_is_measured(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    training = Training(Plan(str(target), data, steps=3, **SMALL), made)

    def stopped(*_: Any) -> Evaluation:
        assert (made / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(training.run())
    assert load_draft(made).block_size == 4
    assert train(target, data, made, resume=True, **SMALL).step == 3


@pytest.fixture
def disk() -> Iterator[Callable[[int], None]]:
    """Gives a function after which writing more into one file fails, as on a full disk."""
    before = getrlimit(RLIMIT_FSIZE)
    yield lambda nbytes: setrlimit(RLIMIT_FSIZE, (nbytes, before[1]))
    setrlimit(RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_saved_before(
    target: Path, data: Path, tmp_path: Path, disk: Callable[[int], None]
) -> None:
    made = tmp_path / "made"
    options: dict[str, Any] = {"save_every": 5, "eval_every": 10}
    training = Training(Plan(str(target), data, steps=10, **SMALL), made, **options)
    saved = {}
    with pytest.raises(DFlashError, match=r"made could not be written .*--resume"):
        for event in training.run():
            if event.step == 6:
                saved = weights(made)
                disk(20_000)
    disk(1 << 40)
    kept = {"training/features/features.bin", "training/features/kept.bin"}  # for the resumed run
    assert files(made) == WHOLE | kept
    assert all(mx.array_equal(weights(made)[name], w) for name, w in saved.items())
    train(target, data, made, steps=10, resume=True, **options, **SMALL)
    train(target, data, tmp_path / "whole", steps=10, **options, **SMALL)
    assert log(made) == log(tmp_path / "whole")
    assert files(made) == WHOLE
