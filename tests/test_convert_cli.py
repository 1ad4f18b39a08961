"""dflash-mlx convert, as a user runs it."""

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dflash_mlx import load, load_draft
from dflash_mlx.cli.convert import Dtype, Mode
from dflash_mlx.convert.task import DTYPES
from dflash_mlx.draft.quantize import LEGAL
from tests import draft_checkpoints as published
from tests.command_line import complaint, run, spawn
from tests.tiny_pair import SENTENCE, write_pair


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return published.write(tmp_path / "draft", published.gemma4())


def test_the_options_offer_all_that_is_there() -> None:
    assert [mode.value for mode in Mode] == list(LEGAL)
    assert [dtype.value for dtype in Dtype] == list(DTYPES)


def test_quantizes_and_shows_what_it_did(source: Path, tmp_path: Path) -> None:
    result = run(
        *("convert", "draft", "--bits", "4", "--group-size", "32", "--dtype", "float16"),
        *("--keep", "fc", "--json", "report.json"),
    )
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["output"] == str(tmp_path / "draft-4bit")
    assert f"Quantized: {report['quantized_share']:.1%} of all weights" in text
    assert f"{report['tensors_before']} tensors" in text
    assert f"{report['mean_error']:.4f} on average, {report['worst_error']:.4f} at worst" in text
    assert "Left as they were, kept: fc." in text
    assert re.search(r"gate_proj x5 bfloat16 4 bit affine/32 \S+ kB \S+ kB 0\.0\d+ 0\.0\d+", text)
    draft = load_draft("draft-4bit")
    assert draft.layers[0].mlp.up_proj.group_size == 32 and "scales" not in draft.fc


def test_lists_layers_that_the_group_size_does_not_divide(tmp_path: Path) -> None:
    config = published.qwen3() | {"intermediate_size": 160}
    published.write(tmp_path / "odd", config)
    result = run("convert", str(tmp_path / "odd"), "--bits", "8", "-o", str(tmp_path / "made"))
    text = " ".join(result.stdout.split())
    assert "Left as they were, 160 wide, which 64 does not divide: layers.0.mlp.down_proj," in text


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = run("convert", "draft", "--mode", "mxfp8", "--dry-run")
    assert result.exit_code == 0
    assert "Nothing was written; it would be" in result.stdout
    assert "8 bit mxfp8/32" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_dequantizes_and_quantizes_again(source: Path, tmp_path: Path) -> None:
    for arguments in (
        ("draft", "--bits", "8"),
        ("draft-8bit", "--dequantize", "-o", "plain"),
        ("plain", "--mode", "nvfp4", "--output", "again"),
    ):
        assert run("convert", *arguments).exit_code == 0
    assert load_draft("again").fc.mode == "nvfp4"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "6"], "Mode affine has no 6 bits; give 4 or 8 bits."),
        (["--bits", "4", "--group-size", "16"], "give 32, 64 or 128"),
        (["--mode", "mxfp4", "--group-size", "64"], "Mode mxfp4 has no group size 64; give 32."),
        (["--mode", "nvfp4", "--bits", "8"], "Mode nvfp4 has no 8 bits; give 4 bits."),
        (["--mode", "fp4"], "'affine', 'mxfp4', 'nvfp4', 'mxfp8'"),
        (["--dtype", "int8"], "'bfloat16', 'float16', 'float32'"),
        (["--dequantize", "--bits", "4"], "not both"),
        ([], "Nothing is asked for"),
    ],
)
def test_usage_errors_list_what_is_legal(
    source: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    line = complaint(run("convert", "draft", *arguments), 2)
    assert said in line and "Try dflash-mlx convert --help." in line
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_other_errors_are_one_sentence(source: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/file").write_text("x")
    line = complaint(run("convert", "draft", "--bits", "4", "-o", "made"), 1)
    assert "made exists already" in line
    assert "There is no directory" in complaint(run("convert", "./none", "--bits", "4"), 1)


def test_checks_a_draft_with_its_target(tmp_path: Path) -> None:
    target, draft = write_pair(tmp_path, SENTENCE)
    made, file = tmp_path / "made", tmp_path / "report.json"
    result = run(
        *("convert", str(draft), "--bits", "8", "--group-size", "32", "-o", str(made)),
        *("--check", str(target), "--json", str(file)),
    )
    assert result.exit_code == 0, result.output
    check = json.loads(file.read_text())["check"]
    assert check["target"] == str(target) and check["same_text"] and check["tokens"] > 20
    for when in ("before", "after"):
        assert check[when]["acceptance_length"] >= 1
        assert check[when]["draft_forward_ms"] > 0
    text = " ".join(result.stdout.split())
    lengths = [f"{check[when]['acceptance_length']:.2f}" for when in ("before", "after")]
    assert f"acceptance length {' '.join(lengths)} draft forward" in text
    assert f"Both gave the same text, {check['tokens']} tokens." in text
    card = (made / "README.md").read_text()
    assert "| Target | target |" in card and str(tmp_path) not in card


def test_a_check_that_fails_says_that_the_draft_is_there(tmp_path: Path) -> None:
    target, _ = write_pair(tmp_path)
    other = published.write(tmp_path / "other", published.qwen3())
    made = tmp_path / "made"
    result = run("convert", str(other), "--bits", "8", "-o", str(made), "--check", str(target))
    line = complaint(result, 1)
    assert f"{made} is finished, but not checked: The draft is 128 wide and the target 64" in line
    assert load_draft(made).fc.bits == 8


def test_nothing_but_the_error_goes_to_a_pipe(source: Path) -> None:
    """Without a terminal no progress bar is drawn, and no escape codes."""
    process = spawn(["convert", "draft", "--bits", "4"], stdout=-1, stderr=-1, text=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert err == "" and "\x1b" not in out


def test_other_commands_quantize_the_draft_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = write_pair(tmp_path, SENTENCE)
    loaded = []

    def remember(*args: Any, **options: Any) -> Any:
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr("dflash_mlx.cli.loading.load", remember)
    pair = ("--model", str(target), "--draft", str(draft))
    results = [
        run("generate", *pair, "--prompt", "Count.", *bits) for bits in ((), ("--draft-bits", "8"))
    ]
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert results[0].stdout == results[1].stdout == f"{SENTENCE}\n"
    plain, quantized = (model.draft for model, _ in loaded)
    assert "scales" not in plain.fc and quantized.fc.bits == 8
    line = complaint(run("generate", *pair, "--prompt", "Count.", "--draft-bits", "5"), 2)
    assert "5 is not one of 4, 8." in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.chdir(tmp_path)
    config = published.qwen3(256) | {"num_hidden_layers": 48, "layer_types": None}
    published.write(tmp_path / "draft", config)
    process = spawn(["convert", "draft", "--bits", "4"], stdout=-1, stderr=-1, text=True)
    while not list(tmp_path.glob(".*.partial")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert out == "" and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]
