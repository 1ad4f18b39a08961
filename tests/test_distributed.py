"""A target over several ranks: the text is plain mlx_lm's over the same ranks."""

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.command_line import PROGRAM
from tests.local_ranks import bench, chat, endless, finish, generate, said, serve, start
from tests.tiny_pair import write_pair


def check(folder: Path, size: int, family: str, parts: list[str]) -> None:
    """The ranks write what plain mlx_lm writes with the same shards."""
    out = folder / "out.json"
    command = [sys.executable, "-m", "tests.rank_program", str(out), family, *parts]
    for code, stderr, _ in finish(start(folder, size, command), 900):
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


# Ranks that wait take turns on a machine's cores: four on two cores take minutes, and hang not.
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5"])
def test_families_shard(tmp_path: Path, family: str, size: int) -> None:
    check(tmp_path, size, family, ["greedy", "turns", "sampled"])


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
        (bench("--kernels", "off"), 2, "--kernels compares the kernels of one machine"),
        (bench("--prompts", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (generate("--pipeline"), 2, "A pipeline over machines cannot be drafted for"),
        ([*PROGRAM, "train"], 2, "train does not run under mlx.launch"),
        (serve("--api-key-file", "nowhere"), 1, "There is no key file nowhere"),
        (chat("--resume", "nowhere.json"), 1, "There is no file nowhere.json"),
        ([*PROGRAM, "generate"], 2, "Under mlx.launch stdin never ends"),
    ):
        first, second = finish(start(tmp_path, 2, arguments))
        assert (first[0], second[0]) == (code, code), first[1] + second[1]
        assert len(said(first[1])) == 1 and sentence in first[1]
        assert said(second[1]) == []


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
