"""Several ranks over loopback, as mlx.launch starts them: MLX's ring backend on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import PROGRAM
from tests.tiny_pair import write_pair


def start(folder: Path, size: int, command: list[str]) -> list[subprocess.Popen]:
    """One process for each rank."""
    sockets = [socket.socket() for _ in range(size)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts), encoding="utf-8")
    return [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "MLX_HOSTFILE": str(file),
                "MLX_RANK": str(rank),
                "HF_HUB_OFFLINE": "1",
            },
        )
        for rank in range(size)
    ]


def finish(ranks: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        return [(*rank.communicate(timeout=seconds), rank.returncode)[::-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def said(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("dflash-mlx: ")]


def check(folder: Path, size: int, family: str, parts: list[str]) -> None:
    """The ranks write what plain mlx_lm writes with the same shards."""
    out = folder / "out.json"
    command = [sys.executable, "-m", "tests.rank_program", str(out), family, *parts]
    for code, stderr, _ in finish(start(folder, size, command), 300):
        assert code == 0, stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["head_gap"] < 1e-4
    greedy = found["greedy"]
    for length in ("1", "None", "auto", "off"):
        tokens, proposed, accepted = greedy[length]
        assert tokens == greedy["plain"], length
        assert (proposed > 0) == (length != "off")
        assert length not in ("1", "None") or accepted > 0
    if "turns" in parts:
        assert found["turns"]["drafted"] == found["turns"]["plain"]
        assert found["turns"]["cached"]
    if "sampled" in parts:
        assert found["sampled"]["rows"] == found["sampled"]["plain"]
        assert found["sampled"]["block"] == found["sampled"]["plain"]


def test_two_ranks(tmp_path: Path) -> None:
    check(tmp_path, 2, "qwen3", ["greedy", "turns", "sampled"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5"])
def test_families_shard(tmp_path: Path, family: str) -> None:
    check(tmp_path, 2, family, ["greedy", "turns", "sampled"])


def generate(*more: str) -> list[str]:
    prompt = ["--prompt", "Hello, I am Zokkim from Tunremisk."]
    return [*PROGRAM, "generate", *prompt, "--verify-length", "15", *more]


def test_only_rank_0_talks(tmp_path: Path) -> None:
    (code, stderr, text), (other, silence, nothing) = finish(start(tmp_path, 2, generate()))
    assert (code, other) == (0, 0), stderr + silence
    assert text.startswith("Hello Zokkim, welcome to the shop.")
    assert "acceptance length" in stderr
    assert (nothing, silence) == ("", "")


def test_refusals(tmp_path: Path) -> None:
    target, draft = write_pair(tmp_path, "One two.")
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(
        json.dumps({**config, "model_type": "gemma2"}), encoding="utf-8"
    )
    pair = ["--model", str(target), "--draft", str(draft)]
    for arguments, code, sentence in (
        (generate(*pair), 1, "mlx-lm cannot shard gemma2"),
        (generate("--pipeline"), 2, "A pipeline over machines cannot be drafted for"),
        ([*PROGRAM, "chat"], 2, "chat does not run under mlx.launch"),
        ([*PROGRAM, "generate"], 2, "Under mlx.launch stdin never ends"),
    ):
        first, second = finish(start(tmp_path, 2, arguments))
        assert (first[0], second[0]) == (code, code), first[1] + second[1]
        assert len(said(first[1])) == 1 and sentence in first[1]
        assert said(second[1]) == []


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_the_other(tmp_path: Path, dies: int) -> None:
    ranks = start(tmp_path, 2, endless())
    assert ranks[0].stdout is not None
    ranks[0].stdout.read(20)
    ranks[dies].kill()
    begin = time.monotonic()
    code, stderr, _ = finish(ranks)[1 - dies]
    assert time.monotonic() - begin < 20
    assert code == 1
    (sentence,) = said(stderr)
    assert "Another rank has ended" in sentence
    assert "Traceback" not in stderr


def test_ctrl_c_in_rank_0_stops_all(tmp_path: Path) -> None:
    ranks = start(tmp_path, 2, endless())
    assert ranks[0].stdout is not None
    ranks[0].stdout.read(20)
    ranks[1].send_signal(signal.SIGINT)  # nobody's
    ranks[0].send_signal(signal.SIGINT)
    (code, stderr, _), (other, silence, _) = finish(ranks)
    assert (code, other) == (130, 130), stderr + silence
    assert "acceptance length" in stderr
    assert silence == ""


def endless() -> list[str]:
    """A text that does not end by itself soon: every end token is unlikely once it has begun."""
    return [
        *PROGRAM,
        "generate",
        "--prompt",
        "zzz qqq",
        "--verify-length",
        "2",
        "--temp",
        "50",
        "--max-tokens",
        "100000",
    ]
