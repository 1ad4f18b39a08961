"""Ctrl-C while `train` is inside a computation that nothing can interrupt."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dflash_mlx import load_draft
from dflash_mlx.training import train
from tests import tiny_pair
from tests.train.runs import OPTIONS, QUESTIONS, SMALL, conversation, files, log, write_rows

# Where `stuck` says so, what is called computes for hours instead, in one call of MLX.
STUCK = """
import sys
from pathlib import Path
import mlx.core as mx
from dflash_mlx.cli import main
from dflash_mlx.training.trainer import Trainer

def compute(whole):
    def computing(self, *given):
        if eval(stuck):
            Path(begun).touch()
            x = mx.zeros((1000, 1000))
            for _ in range(2000):
                x = x @ x
            mx.eval(x)
        return whole(self, *given)
    return computing

stuck, begun, name = sys.argv[1:4]
setattr(Trainer, name, compute(getattr(Trainer, name)))
sys.argv[1:4] = []
main()
"""


@pytest.mark.parametrize(
    ("name", "stuck", "kept"),
    [
        ("seconds_per_step", "True", None),
        ("first_loss", "True", None),
        ("_gradients", "self.step_count == 3 and self.held", 3),
        ("accuracy", "self.step_count == 4", 4),
    ],
)
def test_a_run_is_left_in_the_middle_of_a_long_computation(
    name: str, stuck: str, kept: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflash_mlx.training.run.MEASURING_SECONDS", 0.0)
    target = tiny_pair.write_pair(tmp_path / "pair")[0]
    data = write_rows(tmp_path / "data.jsonl", [conversation(q, "No idea.") for q in QUESTIONS])
    made, begun = tmp_path / "made", tmp_path / "begun"
    arguments = ["train", f"--target={target}", f"--data={data}", f"-o{made}", "--steps=6"]
    arguments += [*OPTIONS, "--eval-every=4"]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, stuck, str(begun), name, *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not begun.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    if kept is None:
        assert "Stopped before the first step" in said
        assert not (made / "model.safetensors").exists()
        return
    assert said.count("Stopped and saved") == 1
    assert f"saved after step {kept}; the same command with --resume goes on." in said
    assert not [file for file in files(made) if "partial" in file]
    options = {**SMALL, "steps": 6, "eval_every": 4}
    train(target, data, made, resume=True, **options)
    train(target, data, tmp_path / "whole", **options)
    assert log(made) == log(tmp_path / "whole")
    assert files(made) == files(tmp_path / "whole")
    weights = dict(tree_flatten(load_draft(made).parameters()))
    whole = dict(tree_flatten(load_draft(tmp_path / "whole").parameters()))
    assert all(mx.array_equal(weights[name], array) for name, array in whole.items())
