"""What lies around: files that macOS leaves, caches that others filled, prompts of other kinds."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

import dflash_mlx
from dflash_mlx import repository
from dflash_mlx.api import encode
from dflash_mlx.checkpoint import load_draft
from dflash_mlx.convert.files import check_output
from dflash_mlx.errors import CheckpointError, DFlashError
from dflash_mlx.repository import resolve
from dflash_mlx.target_checkpoint import load_target
from dflash_mlx.training.directory import TrainingDirectory
from tests.command_line import run
from tests.tiny_pair import SENTENCE, write_pair

APPLE_DOUBLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4072)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path, SENTENCE)


def litter(folder: Path) -> None:
    """What macOS leaves on a volume of another kind."""
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(APPLE_DOUBLE)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


def test_sidecars_of_macos_are_no_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target, draft = pair
    litter(target)
    litter(draft)
    model, tokenizer = dflash_mlx.load(target, draft)
    assert dflash_mlx.generate(model, tokenizer, "Hi\n", max_tokens=4) == "One two three four"
    made = tmp_path / "made"
    result = run("convert", str(draft), "-o", str(made), "--bits", "8", "--group-size", "32")
    assert result.exit_code == 0, result.output
    assert not list(made.glob("._*"))
    # A draft with sidecars holds nothing more than a draft, and may be replaced.
    check_output(draft, target, force=True)


def test_a_directory_with_nothing_but_litter_is_empty(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    litter(made)
    check_output(made, tmp_path, force=False)
    TrainingDirectory(made).check_new()
    # But what a person keeps there is not.
    (made / ".git").mkdir()
    for check in (lambda: check_output(made, tmp_path, False), TrainingDirectory(made).check_new):
        with pytest.raises(DFlashError, match="exists already"):
            check()


def test_other_weights_beside_a_targets_own_are_not_looked_at(pair: tuple[Path, Path]) -> None:
    (pair[0] / "consolidated.safetensors").write_bytes(b"cut short")
    load_target(pair[0])
    (pair[0] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no safetensors weights named model"):
        load_target(pair[0])


def test_everything_that_mlx_lm_fetches_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return "."

    monkeypatch.setattr(repository, "snapshot_download", fetch)
    resolve("org/target")
    assert set(asked[0]) == set(DEFAULT_ALLOW_PATTERNS) and "tiktoken.model" in asked[0]


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of one's own, and no hub."""

    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("incomplete, and no way to fetch the rest")

    cache = tmp_path / "hub"
    find = partial(huggingface_hub.try_to_load_from_cache, cache_dir=cache)
    monkeypatch.setattr(repository, "snapshot_download", unreachable)
    monkeypatch.setattr(repository, "try_to_load_from_cache", find)
    monkeypatch.setattr(repository, "HF_HUB_CACHE", str(cache))
    return cache


def cached(cache: Path, name: str, folder: Path) -> Path:
    """Put a folder into a hub cache as a repository's main revision."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    return place / "snapshots" / ("a" * 40)


def test_a_snapshot_that_suffices_is_used_without_the_hub(
    pair: tuple[Path, Path], no_hub: Path
) -> None:
    """Another tool fetched the configs and weights, and no README.md."""
    target, draft = pair
    cached(no_hub, "org/target", target)
    snapshot = cached(no_hub, "org/draft", draft)
    assert resolve("org/draft", draft=True) == snapshot
    load_draft("org/draft")
    load_target("org/target")


def test_what_is_missing_in_the_cache_is_named(pair: tuple[Path, Path], no_hub: Path) -> None:
    snapshot = cached(no_hub, "org/draft", pair[1])
    with pytest.raises(CheckpointError, match="not its revision 'v9'"):
        resolve("org/draft", "v9")
    with pytest.raises(CheckpointError, match="has no such repository"):
        resolve("org/other")
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00002"):
        load_draft("org/draft")
    (snapshot / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has org/draft without its config\.json"):
        load_draft("org/draft")


def test_an_adapter_of_another_library_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(CheckpointError, match="lacks adapter_config"):
        load_target(pair[0], adapter_path=str(adapter))
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(CheckpointError, match="is an adapter of PEFT"):
        load_target(pair[0], adapter_path=str(adapter))


def test_weights_that_do_not_fit_are_named(pair: tuple[Path, Path]) -> None:
    """All lines of what mlx-lm says, the last of which is the one that matters."""
    file = pair[0] / "model.safetensors"
    weights = dict(mx.load(str(file)))
    mx.save_safetensors(str(file), weights | {"visual.weight": mx.zeros((2, 2))}, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=r"not in model: visual\.weight"):
        load_target(pair[0])


IDS: list[tuple[str, Callable[[list[int]], Any]]] = [
    ("list", list),
    ("tuple", tuple),
    ("iterator", iter),
    ("MLX", mx.array),
    ("NumPy", np.array),
    ("NumPy of 64 bits", lambda ids: np.array(ids, dtype=np.int64)),
    ("list of NumPy", lambda ids: list(np.array(ids))),
    ("list of MLX", lambda ids: [mx.array(i).item() for i in ids]),
]


@pytest.mark.parametrize("make", [make for _, make in IDS], ids=[name for name, _ in IDS])
def test_prompts_are_taken_in_every_kind(pair: tuple[Path, Path], make: Any) -> None:
    model, tokenizer = dflash_mlx.load(*pair)
    ids = tokenizer.encode("Hi there\n")
    text = dflash_mlx.generate(model, tokenizer, make(ids), max_tokens=4)
    assert text == "One two three four"


@pytest.mark.parametrize(
    "prompt",
    [np.array([[1, 2]]), mx.array([[1, 2]]), [[1, 2]], {"input_ids": [1]}, [1.5], ["a"], 7, None],
)
def test_what_is_no_prompt_is_refused(pair: tuple[Path, Path], prompt: Any) -> None:
    _, tokenizer = load_target(pair[0])
    with pytest.raises(DFlashError, match="not one row of token ids"):
        encode(tokenizer, prompt)


def test_a_chat_without_a_template_says_so(pair: tuple[Path, Path]) -> None:
    file = pair[0] / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    arguments = ["chat", "-m", str(pair[0]), "--draft", str(pair[1])]
    assert "no chat template" not in run(*arguments, stdin="Hi\n").stderr
    del settings["chat_template"]
    file.write_text(json.dumps(settings))
    result = run(*arguments, "--max-tokens", "3", stdin="Hi\n")
    assert result.exit_code == 0 and "This model has no chat template" in result.stderr


@pytest.mark.parametrize(
    "kind", ["short", "a name of middling length here", "long " * 60, "字" * 40]
)
def test_names_in_a_chart_stay_inside(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    kind = kind.strip()
    prompts, chart = tmp_path / "p.jsonl", tmp_path / "chart.svg"
    prompts.write_text(json.dumps({"prompt": "Count.", "kind": kind}))
    options = ["--prompts", str(prompts), "--repeats", "1", "--plot", str(chart)]
    result = run("bench", "-m", str(pair[0]), "--draft", str(pair[1]), *options)
    assert result.exit_code == 0, result.output
    root = ElementTree.fromstring(chart.read_text())
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    shown = next(t for t in texts if (t.text or "")[:4] == kind[:4])
    width = sum(2 if ord(c) > 0x2E80 else 1 for c in shown.text or "") * 0.58 * 14
    assert float(shown.attrib["x"]) - width >= 0 and shown.attrib["text-anchor"] == "end"
    assert shown.text == kind or (shown.text or "").endswith("…")
    assert len(kind) >= 40 or shown.text == kind
    bars = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    for bar in bars[1:]:
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) < float(root.attrib["width"])
