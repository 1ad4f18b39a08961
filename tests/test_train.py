"""dflash-mlx train: from a user's file to a draft that every other command takes."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as load_plain
from mlx_lm import stream_generate as stream_plain
from mlx_lm.utils import quantize_model, save_model
from tokenizers import AddedToken

from dflash_mlx import load, load_draft, stream_generate
from dflash_mlx.conversation.template import Template
from dflash_mlx.demo import demo_paths
from dflash_mlx.demo.making.text import example
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.draft.formats.fields import default_target_layer_ids
from dflash_mlx.errors import DFlashError
from dflash_mlx.target import TargetView
from dflash_mlx.training import Evaluation, Plan, Training, train
from dflash_mlx.training.answer_store import AnswerStore
from dflash_mlx.training.answers import Author, answered
from dflash_mlx.training.batches import Sample
from dflash_mlx.training.data import can_teach, encode_rows, opening, read_rows
from dflash_mlx.training.design import design_draft, even_taps, mask_token, shared_heads
from dflash_mlx.training.estimate import duration
from dflash_mlx.training.run import final_norm
from dflash_mlx.training.trainer import FrozenTarget, Trainer, new_draft
from tests import tiny_pair
from tests.command_line import complaint, run, spawn
from tests.families.configs import CONFIGS, REFUSED
from tests.families.models import build, configure

QUESTIONS = ["Hi", "How are you", "What is it", "Tell me more", "And then", "Who", "Go on", "Why"]
SMALL: dict[str, Any] = {
    "draft_layers": 1,
    "block_size": 4,
    "batch_size": 2,
    "seq_length": 64,
    "anchors": 8,
    "warmup": 1,
}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that recites a sentence."""
    return tiny_pair.write_pair(tmp_path_factory.mktemp("pair"), says=tiny_pair.SENTENCE)[0]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with random weights, whose text depends on the whole context."""
    return tiny_pair.write_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", [conversation(q, "No idea.") for q in QUESTIONS])


def conversation(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": s} for i, s in enumerate(said)]}


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def log(output: Path, key: str = "loss") -> list[Any]:
    lines = (output / "training" / "log.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


def weights(draft: Path) -> dict[str, mx.array]:
    return dict(tree_flatten(load_draft(draft).parameters()))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


WHOLE = {
    "README.md",
    "config.json",
    "model.safetensors",
    "training/log.jsonl",
    "training/options.json",
    "training/state.safetensors",
}


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


def test_the_first_loss_is_the_lowest_of_several_norms(
    wordy: Path, data: Path, tmp_path: Path
) -> None:
    training = Training(Plan(str(wordy), data, steps=1, **SMALL), tmp_path / "made")
    (said,) = [line for line in training.remarks if line.startswith("First loss ")]
    loss, scale = re.fullmatch(r"First loss (\S+), with (\S+) times .*", said).groups()  # type: ignore[union-attr]
    trainer = training.trainer
    assert trainer.first_loss() == pytest.approx(float(loss), abs=0.006)
    norm = mx.array(trainer.draft.norm.weight) / float(scale)
    others = []
    for other in (1.0, 0.5, 0.25, 0.125):
        trainer.draft.norm.weight = norm * other
        others.append(trainer.first_loss())
    assert float(loss) == pytest.approx(min(others), abs=0.006)


def test_the_mask_is_the_one_of_the_lowest_first_loss(
    wordy: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run is resumed, and whatever order the tokens come in."""
    masks = [5, 0, 7, 3]
    monkeypatch.setattr("dflash_mlx.training.run.mask_tokens", lambda size, tokenizer: iter(masks))
    made = tmp_path / "made"
    training = Training(Plan(str(wordy), data, steps=2, **SMALL), made)
    losses = {}
    chosen = training.trainer.draft.config.mask_token_id
    for mask in masks:
        training._mask_with(mask)
        losses[mask] = training.trainer.first_loss()
    assert chosen == min(losses, key=lambda mask: losses[mask])
    assert any(f"masked with token {chosen}." in remark for remark in training.remarks)
    training._mask_with(chosen)
    list(training.run())
    assert (
        json.loads((made / "config.json").read_text())["dflash_config"]["mask_token_id"] == chosen
    )
    masks.reverse()
    resumed = Training(Plan(str(wordy), data, steps=3, **SMALL), made, resume=True)
    assert resumed.trainer.draft.config.mask_token_id == chosen


def test_a_useless_draft_is_said_to_be_one(wordy: Path, data: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    arguments = [f"--target={wordy}", f"--data={data}", f"-o{made}", *OPTIONS, "--eval-every=1"]
    result = run("train", *arguments, "--steps=2")
    assert result.exit_code == 0, result.output
    assert "This draft is of little use yet: " in result.stderr
    assert "The last 1 steps took it from " in result.stderr


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


def test_memory_that_runs_out_names_the_options(target: Path, data: Path, tmp_path: Path) -> None:
    plan = Plan(str(target), data, steps=2, **{**SMALL, "anchors": 10**15})
    with pytest.raises(
        DFlashError,
        match=r"Memory ran out in step 1 .*lower --batch-size \(now 2\), --anchors \(now 10+\) or "
        r"--seq-length \(now 64\)",
    ):
        list(Training(plan, tmp_path / "made").run())


def test_the_assistants_tokens_alone_are_learnt(tmp_path: Path) -> None:
    tokenizer = load(*demo_paths())[1]
    item = example("dialogue", "train", 3)
    rows = [{"messages": list(item.messages)}, {"text": "One. Two."}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    talk, text = encode_rows(read_rows(file), Template(tokenizer), 512).samples
    answers = [m["content"] for m in item.messages if m["role"] == "assistant"]
    learnt = "".join(tokenizer.decode([t]) for t in talk.tokens[talk.learn])
    assert learnt == "".join(f"{answer}<|end|>" for answer in answers)
    assert len(answers) > 1
    prompt = tokenizer.decode(talk.tokens[: opening(talk)].tolist())
    assert (
        prompt
        == "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in item.prompt) + "<|assistant|>"
    )
    assert text.learn.all()
    assert tokenizer.decode(text.tokens.tolist()) == "One. Two.<|end|>"
    assert opening(text) == len(text.tokens) // 4


REWRITING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_what_a_template_rewrites_is_not_learnt(tmp_path: Path) -> None:
    """As templates do that drop the thinking of earlier turns."""
    tokenizer = load(*demo_paths())[1]
    tokenizer._tokenizer.chat_template = tokenizer.chat_template = REWRITING
    file = write_rows(tmp_path / "rows.jsonl", [conversation("A?", "<hm>Yes.", "B?", "<ah>No.")])
    (sample,) = encode_rows(read_rows(file), Template(tokenizer), 512).samples
    text = "[user]A?<|end|>\n[assistant]Yes.<|end|>\n[user]B?<|end|>\n[assistant]<ah>No.<|end|>"
    assert tokenizer.decode(sample.tokens.tolist()) == text
    learnt = [tokenizer.decode([token]) for token in sample.tokens[sample.learn]]
    assert "".join(learnt) == "<ah>No.<|end|>"


def test_long_texts_become_pieces_and_long_conversations_are_cut(tmp_path: Path) -> None:
    tokenizer = load(*demo_paths())[1]
    text = " ".join(f"Word number {i}." for i in range(200))
    file = tmp_path / "book.txt"
    file.write_text(text)
    pieces = encode_rows(read_rows(file), Template(tokenizer), 50)
    assert {len(sample.tokens) for sample in pieces.samples[:-1]} == {50}
    whole = np.concatenate([sample.tokens for sample in pieces.samples])
    assert tokenizer.decode(whole.tolist()) == f"{text}<|end|>"
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [conversation("Hello", text)]))
    cut = encode_rows(rows, Template(tokenizer), 50)
    assert [len(sample.tokens) for sample in cut.samples] == [50]
    assert (pieces.shortened, cut.shortened) == (0, 1)
    assert can_teach(cut.samples[0])
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [conversation(text, "Hello")]))
    assert not can_teach(encode_rows(rows, Template(tokenizer), 50).samples[0])


def plainly(target: Path, prompt: Any, most: int) -> list[int]:
    """The tokens that mlx_lm writes greedily."""
    model, tokenizer = load_plain(str(target))[:2]
    return [r.token for r in stream_plain(model, tokenizer, prompt, max_tokens=most)]


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


def test_what_cannot_be_gone_on_from(target: Path, data: Path, tmp_path: Path) -> None:
    draft = str(demo_paths()[1])
    tail = ["--target=demo", f"--data={data}", f"-o{tmp_path / 'made'}", "--steps=1"]
    said = complaint(run("train", *tail, f"--init={draft}", "--draft-layers=2"), 1)
    assert "its own layers, block size, taps and mask token" in said
    run("convert", draft, "-o", str(tmp_path / "8bit"), "--bits=8", "--group-size=32")
    said = complaint(run("train", *tail, f"--init={tmp_path / '8bit'}"), 1)
    assert "is quantized, and what is quantized cannot be trained" in said
    vectors = Path(__file__).parent / "vectors"
    others = {"dspark_lfm2": "LiquidAI", "spec_dflash2": "DFlash 2", "muse_assistant": "Muse"}
    for name, packaging in others.items():
        said = complaint(run("train", *tail, f"--init={vectors / name}"), 1)
        assert packaging in said and "DFlash 1 only" in said
    said = complaint(run("train", *[*tail[1:], f"--target={target}"], f"--init={draft}"), 1)
    assert "give the draft that was trained for this target" in said
    assert not (tmp_path / "made").exists()


def test_a_quantized_target_is_trained_for(wordy: Path, data: Path, tmp_path: Path) -> None:
    model, tokenizer = load_plain(str(wordy))[:2]
    config = json.loads((wordy / "config.json").read_text())
    model, config = quantize_model(model, config, 32, 8)
    save_model(tmp_path / "8bit", model)
    (tmp_path / "8bit/config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path / "8bit")
    train(tmp_path / "8bit", data, tmp_path / "made", steps=2, regenerate=8, **SMALL)
    pair = load(tmp_path / "8bit", tmp_path / "made")
    tokens = [r.token for r in stream_generate(*pair, "Hi", 30, verify_length=None)]
    assert tokens == plainly(tmp_path / "8bit", "Hi", 30)


@pytest.mark.slow
def test_a_hybrid_target_gets_a_draft_that_is_accepted(tmp_path: Path) -> None:
    words = tiny_pair.vocabulary(tiny_pair.SENTENCE)
    kind, config = CONFIGS["qwen3_5"]
    text = {**config["text_config"], "vocab_size": len(words), "tie_word_embeddings": False}
    mx.random.seed(3)
    model = configure(kind, {"text_config": text})
    # Its layers are at work, and the sentence is heard above them.
    language = model.language_model
    embedding = 2 * mx.random.normal(language.model.embed_tokens.weight.shape)
    language.model.embed_tokens.weight = embedding
    language.lm_head.weight = tiny_pair.reciting_head(embedding, words, tiny_pair.SENTENCE)
    folder, made = tmp_path / "target", tmp_path / "made"
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text}))
    tiny_pair.write_tokenizer(folder, words)
    asked = [f"{q} {i}" for i in range(6) for q in QUESTIONS]
    file = write_rows(tmp_path / "data.jsonl", [conversation(q) for q in asked])
    options = {**SMALL, "batch_size": 4, "anchors": 16, "draft_layers": 2, "regenerate": 48}
    train(folder, file, made, steps=400, eval_every=200, lr=3e-3, **options)
    untrained = train(folder, file, tmp_path / "raw", steps=1, lr=1e-9, **options)
    assert log(made, "acceptance_length")[-1] > max(2 * untrained.acceptance_length, 2.5)
    pair = load(folder, made)
    for prompt in ("Hi 3", "Nobody asked this"):
        tokens = [r.token for r in stream_generate(*pair, prompt, 60, verify_length=None)]
        assert tokens == plainly(folder, prompt, 60)


BAD_DATA = {
    "a missing file": (None, "There is no file .*My Data.jsonl"),
    "nothing": (b"\n\n", "holds no text"),
    "no JSON": (b'{"text": "a b c d e"}\nfree text\n', "Line 2 of .*My Data.jsonl is not JSON"),
    "no text": (b'{"prose": "a"}\n', "Line 1 of .* has no text to learn"),
    "a list": (b"[1]\n", "Line 1 of .* is no JSON object"),
    "empty text": (b'{"text": " "}\n', "Line 1 of .* has no text to learn"),
    "odd messages": (
        b'{"messages": [{"role": "user"}]}\n',
        "Line 1 of .* a message 1 without content",
    ),
    "no answer": (
        b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
        "Line 1 of .* has no assistant message to learn from; --regenerate N",
    ),
    "one line": (b'{"text": "a b c d e f g"}\n', "gives 1 sequence to learn from; at least 2"),
    "another encoding": (
        '{"text": "Grüße"}\n'.encode("latin-1"),
        "is not UTF-8: line 1 has the byte 0xFC at byte 12",
    ),
}


@pytest.mark.parametrize(("content", "said"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_named(target: Path, tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "My Data.jsonl"
    if content is not None:
        file.write_bytes(content)
    made = tmp_path / "made"
    result = run("train", f"--target={target}", f"--data={file}", f"-o{made}", *OPTIONS)
    assert re.search(said, complaint(result, 1))
    assert not made.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--steps=0"], 2, "--steps"),
        (["--taps=one"], 2, "neither auto nor layers"),
        (["--taps=1,9"], 1, "layers of the target, from 0 to 3"),
        (["--taps=1,1"], 1, "different layers of the target"),
        (["--block-size=65"], 1, "A block of 65 tokens is longer than a sequence of 64"),
        (["--lr=0"], 1, "lr is 0.0; give more than 0"),
        (["--data=notes.pdf"], 1, "neither a .jsonl nor a .json nor a .txt file"),
        (["--target=nowhere"], 1, "There is no directory nowhere"),
    ],
)
def test_options_that_cannot_be(
    target: Path, data: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    made = tmp_path / "made"
    given = [f"--target={target}", f"--data={data}", f"-o{made}", *OPTIONS, *arguments]
    assert said in complaint(run("train", *given), code)
    assert not made.exists()


def test_a_target_that_cannot_be_tapped_is_refused(data: Path, tmp_path: Path) -> None:
    kind, config, reason = REFUSED["iquestloopcoder"]
    words = tiny_pair.vocabulary(tiny_pair.SENTENCE)
    folder = tmp_path / "target"
    save_model(folder, configure(kind, {**config, "vocab_size": len(words)}))
    content = {"model_type": kind, **config, "vocab_size": len(words)}
    (folder / "config.json").write_text(json.dumps(content))
    tiny_pair.write_tokenizer(folder, words)
    result = run("train", f"--target={folder}", f"--data={data}", f"-o{tmp_path / 'made'}")
    assert reason in complaint(result, 1)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_trained_for(family: str) -> None:
    """Sequences of a batch neither see each other nor their padding, and gradients are numbers."""
    view = TargetView(build(family))
    taps = even_taps(view.depth)
    frozen = FrozenTarget.of(view, taps)
    tokens = np.random.default_rng(0).integers(1, view.vocab_size, (2, 40)).astype(np.int32)
    tokens[1, 25:] = 0
    together = frozen.features(mx.array(tokens))
    for row, length in enumerate((40, 25)):
        alone = frozen.features(mx.array(tokens[row : row + 1, :length]))[0]
        assert mx.allclose(together[row, :length], alone, rtol=1e-3, atol=1e-4)
    config = {
        "architectures": ["DFlashDraftModel"],
        "hidden_size": view.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": view.vocab_size,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "block_size": 4,
        "dflash_config": {"target_layer_ids": taps, "mask_token_id": 0},
    }
    samples = [Sample(tokens[0], np.ones(40, bool)), Sample(tokens[1, :25], np.ones(25, bool))]
    plan = Plan("", Path(), steps=2, batch_size=2, seq_length=40, anchors=4)
    trainer = Trainer(new_draft(config, final_norm(view), 0), frozen, samples, plan)
    before = dict(tree_flatten(trainer.draft.parameters()))
    assert all(np.isfinite(trainer.step().loss) for _ in range(2))
    after = dict(tree_flatten(trainer.draft.parameters()))
    assert all(mx.all(mx.isfinite(array)) for array in after.values())
    assert not mx.array_equal(before["fc.weight"], after["fc.weight"])


def test_a_new_draft_has_the_proportions_of_published_ones() -> None:
    assert [shared_heads(heads) for heads in (4, 16, 22, 32, 40)] == [4, 4, 2, 8, 10]
    assert even_taps(36) == default_target_layer_ids(5, 36) == [1, 9, 17, 25, 33]
    assert even_taps(12) == [1, 3, 5, 7, 9]
    assert [even_taps(depth) for depth in (1, 2, 4, 5, 6)] == [[0], [1], [2], [1, 2], [1, 2, 3]]


class Vocabulary:
    """A tokenizer as far as `mask_token` looks."""

    eos_token_ids = frozenset({1})

    def __init__(self, mask: int | None, pad: int | None, **words: int):
        inner = {"mask_token_id": mask, "pad_token_id": pad, "bos_token_id": 2}
        special = {i: AddedToken(word, special=True) for word, i in words.items() if "<" in word}
        inner |= {"chat_template": "<user>{{ m }}", "added_tokens_decoder": special}
        self._tokenizer = type("Inner", (), inner)
        self.words = words

    def get_added_vocab(self) -> dict[str, int]:
        return {word: i for word, i in self.words.items() if "<" in word}

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_the_mask_is_a_token_that_no_text_holds() -> None:
    assert mask_token(9, Vocabulary(4, 0, a=8)) == 4  # type: ignore[arg-type]
    assert mask_token(9, Vocabulary(None, 0, **{"<|mask|>": 3, "a": 8})) == 3  # type: ignore[arg-type]
    assert mask_token(9, Vocabulary(None, 0, a=6)) == 7  # type: ignore[arg-type]
    assert mask_token(9, Vocabulary(None, 0, a=8)) == 0  # type: ignore[arg-type]
    with pytest.raises(DFlashError, match="--mask-token"):
        mask_token(9, Vocabulary(None, 1, a=8))  # type: ignore[arg-type]


# Full vocabularies, whose stop token is 1 and beginning 2: what masks, in order of preference.
FULL = [
    ({"<end>": 1, "<a>": 3, "<|reserved_special_token_4|>": 4, "<b>": 8}, 4),
    ({"<end>": 1, "<unused0>": 5, "<b>": 8}, 5),
    ({"<end>": 1, "<a>": 3, "<|finetune_right_pad_id|>": 4, "<b>": 8}, 4),
    ({"<end>": 1, "<filename>": 3, "<user>": 4, "a": 8}, 3),
    ({"<end>": 1, "<begin>": 2, "<user>": 4, "a": 8}, None),
]


@pytest.mark.parametrize(("words", "expected"), FULL)
def test_a_token_to_spare_masks_where_there_is_no_mask(
    words: dict[str, int], expected: int | None
) -> None:
    vocabulary: Any = Vocabulary(None, None, **words)
    if expected is None:
        with pytest.raises(DFlashError, match="--mask-token"):
            mask_token(9, vocabulary)
    else:
        assert mask_token(9, vocabulary) == expected


def test_the_mask_can_be_named() -> None:
    vocabulary: Any = Vocabulary(3, 0, a=8, b=5, **{"7": 6})
    assert [mask_token(9, vocabulary, wanted) for wanted in ("b", "4", "7")] == [5, 4, 6]
    for wanted in ("9", "-1", "c", "a b", "", "9" * 5000):
        with pytest.raises(DFlashError, match="is no token of the target"):
            mask_token(9, vocabulary, wanted)
    with pytest.raises(DFlashError, match="ends the target's texts"):
        mask_token(9, vocabulary, "1")


def test_the_named_mask_is_the_drafts(target: Path, data: Path, tmp_path: Path) -> None:
    train(target, data, tmp_path / "made", steps=1, mask_token="<|pad|>", **SMALL)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["dflash_config"]["mask_token_id"] == 0
    with pytest.raises(DFlashError, match="its own layers"):
        train(target, data, tmp_path / "b", init=str(tmp_path / "made"), mask_token="a")


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 2e4}}, 2e4),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 2e4}}, 2e4),
        ({"rope_theta": 3e4, "rope_parameters": None}, 3e4),
        ({"rope_theta": 3e4, "rope_parameters": {"rope_theta": None}}, 3e4),
        ({"rope_theta": 1.0, "text_config": {"rope_parameters": {"rope_theta": 2e4}}}, 2e4),
        ({"rope_theta": 3e4, "text_config": {"rope_theta": None}}, 3e4),
        (
            {
                "rope_theta": 7.0,
                "rope_parameters": {
                    "sliding_attention": {"rope_theta": 1e4},
                    "full_attention": {"rope_theta": 1e6},
                },
            },
            1e6,
        ),
        ({}, 1e4),
    ],
)
def test_rope_parameters_win_over_flat_keys(
    config: dict[str, Any], base: float, target: Path
) -> None:
    model, tokenizer = load_plain(str(target))[:2]
    made = design_draft(TargetView(model), config, tokenizer, layers=1, block_size=4, taps=None)
    assert made["rope_theta"] == base
