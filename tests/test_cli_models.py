"""dflash-mlx models, as a user runs it."""

import json
from pathlib import Path

import pytest
from mlx_lm.convert import convert

from dflash_mlx.measure import hub
from dflash_mlx.published import PAIRS
from tests.command_line import complaint, run
from tests.tiny_pair import SENTENCE, write_draft, write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), SENTENCE)


def inspected(path: Path, *options: str) -> str:
    result = run("models", "--inspect", str(path), *options)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_lists_the_published_pairs():
    result = run("models")
    assert result.exit_code == 0
    for published in PAIRS:
        for name in (published.target, published.draft, *published.others):
            assert name in result.stdout


def test_says_what_is_in_the_cache(tmp_path, monkeypatch):
    for repo, count in (("z-lab/Qwen3-4B-DFlash-b16", 3000), ("mlx-community/Qwen3-4B-4bit", 50)):
        folder = tmp_path / f"models--{repo.replace('/', '--')}"
        (folder / "snapshots" / "0a").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0a")
        (folder / "snapshots" / "0a" / "model.safetensors").write_bytes(b"x" * count)
    scan = hub.scan_cache_dir
    monkeypatch.setattr(hub, "scan_cache_dir", lambda: scan(tmp_path))
    shown = run("models").stdout
    row = next(line for line in shown.splitlines() if "z-lab/Qwen3-4B-DFlash-b16" in line)
    assert row.rstrip().endswith("3 kB")
    assert "In the cache: mlx-community/Qwen3-4B-4bit, 50 B" in shown


def test_inspects_a_target(pair):
    shown = inspected(pair[0])
    assert "qwen3" in shown and "taps 0 to 3" in shown and "head Linear" in shown
    assert "0-3: KVCache, rolled back by offset" in shown
    assert "No published draft is known" in shown


def test_inspects_a_draft(pair):
    shown = inspected(pair[1])
    assert "DFlash 1" in shown and "taps 1, 2 of 4 layers" in shown
    assert "4 rows, so 3 proposals" in shown


def test_parameters_are_counted_through_quantization(pair, tmp_path):
    convert(str(pair[0]), str(tmp_path / "small"), quantize=True, q_group_size=32, q_bits=4)
    before = json.loads((pair[0] / "config.json").read_text())["vocab_size"]
    assert before % 32 != 1
    counted = [inspected(path).split(" parameters")[0] for path in (pair[0], tmp_path / "small")]
    assert counted[0] == counted[1]
    assert "4 bits in groups of 32" in inspected(tmp_path / "small")


def test_says_whether_the_two_fit(pair, tmp_path):
    assert f"{pair[1]} fits this target." in inspected(pair[0], "--draft", str(pair[1]))
    write_draft(tmp_path / "other", 500, num_target_layers=9)
    shown = inspected(pair[0], "--draft", str(tmp_path / "other"))
    assert "a target of 9 layers" in shown and "fits this target" not in shown


def test_errors(pair, tmp_path):
    draft = str(pair[1])
    assert "no directory" in complaint(run("models", "--inspect", "./nowhere"), 1)
    assert "config.json" in complaint(run("models", "--inspect", str(tmp_path)), 1)
    assert "--inspect" in complaint(run("models", "--draft", draft), 2)
    said = run("models", "--inspect", draft, "--draft", draft)
    assert "is a draft" in complaint(said, 2)
