"""The target's own answers: right, kept, and asked for once."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm import load as load_plain

from dflash_mlx import load_draft
from dflash_mlx.conversation.template import Template
from dflash_mlx.demo import demo_paths
from dflash_mlx.demo.making.text import example
from dflash_mlx.target import TargetView
from dflash_mlx.training import train
from dflash_mlx.training.answer_store import AnswerStore
from dflash_mlx.training.answers import Author, answered
from dflash_mlx.training.batches import Sample
from dflash_mlx.training.data import encode_rows, opening, read_rows
from tests.train.runs import SMALL, log, plainly, write_rows


@pytest.mark.parametrize("help", ["alone", "with a draft"])
def test_regenerated_answers_are_what_the_target_writes(tmp_path: Path, help: str) -> None:
    """Also where the text has other answers, none, or several; and of a text without roles."""
    model, tokenizer = load_plain(str(demo_paths()[0]))[:2]
    kinds = ("dialogue", "dialogue", "function", "function")
    talks = [list(example(kind, "train", i).messages) for i, kind in enumerate(kinds)]
    odd = {"role": "assistant", "content": "No."}
    talks += [[*talks[0][:-1], odd], talks[1][:-1], [talks[1][0], odd, *talks[1][2:]]]
    rows: list[dict[str, Any]] = [{"messages": talk} for talk in talks]
    rows.append({"text": "def double(x):\n    return 2 * x\n"})
    found = encode_rows(
        read_rows(write_rows(tmp_path / "rows.jsonl", rows)),
        Template(tokenizer),
        200,
        unanswered=True,
    )
    draft = load_draft(demo_paths()[1]) if help == "with a draft" else None
    author = Author(TargetView(model), tokenizer, draft)
    file, progress = tmp_path / "kept" / "answers.jsonl", []

    def answer(author: Author) -> list[Sample]:
        progress.clear()
        store = AnswerStore(file, 200)
        found_now = answered(found.samples, author, store, lambda *done: progress.append(done))
        return [sample for sample in found_now if sample is not None]

    made = answer(author)
    assert progress == [(done, 8) for done in range(9)]  # each is kept as it comes
    for sample, before in zip(made, found.samples, strict=True):
        bounds = np.flatnonzero(np.diff(sample.learn.astype(int))) + 1
        runs = [*bounds.tolist(), len(sample.tokens)]
        for start, end in zip(runs[::2], runs[1::2], strict=True):
            written = plainly(demo_paths()[0], sample.tokens[:start].tolist(), 200 - start)
            assert written == sample.tokens[start:end].tolist()
        start = opening(before)
        assert (sample.tokens[: min(start, runs[0])] == before.tokens[: min(start, runs[0])]).all()
    changed = [
        not np.array_equal(a.tokens, b.tokens) for a, b in zip(made, found.samples, strict=True)
    ]
    assert changed[4:] == [True] * 4
    asked = [message["content"] for message in talks[6] if message["role"] == "user"]
    said = tokenizer.decode(made[6].tokens[~made[6].learn].tolist())
    assert len(asked) > 1
    assert all(text in said for text in asked)

    # A second time nothing is asked, and what was cut off is.
    silent = Author(TargetView(model), tokenizer, None)
    silent.choices = silent.continuations = None  # type: ignore[assignment]
    again = answer(silent)
    assert progress == [(8, 8)]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(made, again, strict=True))
    assert all(np.array_equal(a.learn, b.learn) for a, b in zip(made, again, strict=True))
    file.write_text(file.read_text()[:-9])
    mended = answer(author)
    assert progress == [(7, 8), (8, 8)]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(made, mended, strict=True))
    assert len(file.read_text().splitlines()) == 8


def test_a_second_run_uses_the_answers_of_the_first(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(target, data, tmp_path / "one", steps=1, regenerate=8, **SMALL)
    (kept,) = (tmp_path / "cache").rglob("answers/*.jsonl")
    assert len(kept.read_text().splitlines()) == 8
    monkeypatch.setattr(Author, "choices", None)
    monkeypatch.setattr(Author, "continuations", None)
    train(target, data, tmp_path / "two", steps=1, regenerate=8, **SMALL)
    assert log(tmp_path / "one") == log(tmp_path / "two")


def test_answers_belong_to_a_target_its_adapter_and_its_weights(
    target: Path, tmp_path: Path
) -> None:
    copy, adapter = tmp_path / "copy", tmp_path / "adapter"
    shutil.copytree(target, copy)
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"1")
    before = AnswerStore.of([copy], 64).file
    assert before == AnswerStore.of([copy], 64).file
    others = {AnswerStore.of([copy, adapter], 64).file}
    os.utime(copy / "model.safetensors", ns=(0, 0))  # saved again, as large as before
    others.add(AnswerStore.of([copy], 64).file)
    assert len(others) == 2
    assert before not in others
