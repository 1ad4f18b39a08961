"""What a case is made of: a sound input, some damage, and the command that meets it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import typer

from dflash_mlx.cli import app
from tests.fuzz.bases import Bases, Sound
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_safetensors, mutate_tree

Command = tuple[list[str], bytes]


def spread(count: int, kinds: list[str]) -> list[tuple[str, int]]:
    """So many jobs, the kinds in turn."""
    return [(kinds[i % len(kinds)], i // len(kinds)) for i in range(count)]


def build(kind: str, seed: int, number: int, bases: Bases, folder: Path) -> Command:
    """Write the input of a case into an empty folder.

    Returns:
        The arguments of `dflash-mlx`, and stdin.
    """
    return KINDS[kind](Random(f"{seed} {kind} {number}"), bases, folder)


def _damaged(directory: Path, folder: Path, files: list[str], rng: Random) -> Path:
    """A copy of a model directory in which one of these files is damaged."""
    copy = folder / directory.name
    shutil.copytree(directory, copy)
    file = copy / rng.choice(files)
    if rng.random() < 0.03:
        file.unlink()
        if rng.random() < 0.5:
            file.mkdir()
        elif rng.random() < 0.5:
            file.symlink_to(file)
        return copy
    mutate = mutate_safetensors if file.suffix == ".safetensors" else mutate_json
    file.write_bytes(mutate(file.read_bytes(), rng))
    return copy


def _asked(target: Path, draft: Path, rng: Random) -> list[str]:
    """A short generation, now and then another command that loads the same."""
    other = rng.random()
    if other < 0.08:
        return ["models", "--inspect", str(target), "--draft", str(draft)]
    length = "auto" if other < 0.1 else "3"
    return [
        "generate", "-m", str(target), "--draft", str(draft), "-p", "One two", "--max-tokens", "6",
        "--verify-length", length,
    ]  # fmt: skip


def _draft(rng: Random, bases: Bases, folder: Path) -> Command:
    # Half the cases on the four with the most in them, half over all packagings.
    pair = bases.pair(rng.choice(bases.drafts[:4] if rng.random() < 0.5 else bases.drafts))
    files = ["config.json"] * 3 + ["model.safetensors"]
    if (pair.draft / "model.safetensors.index.json").is_file():
        files.append("model.safetensors.index.json")
    draft = _damaged(pair.draft, folder, files, rng)
    if rng.random() < 0.1:
        return ["convert", str(draft), "-o", str(folder / "out"), "--bits", "8"], b""
    return _asked(pair.target, draft, rng), b""


def _target(rng: Random, bases: Bases, folder: Path) -> Command:
    pair = bases.pair(rng.choice(bases.targets))
    files = ["config.json"] * 3 + ["model.safetensors"]
    target = _damaged(pair.target, folder, files, rng)
    return _asked(target, pair.draft, rng), b""


def _tokenizer(rng: Random, bases: Bases, folder: Path) -> Command:
    pair = bases.pair(rng.choice(("tiny", "bytes")))
    files = ["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]
    if (pair.target / "generation_config.json").is_file():
        files.append("generation_config.json")
    if rng.random() < 0.15:
        target = folder / "target"
        shutil.copytree(pair.target, target)
        _move_ids(target / "tokenizer.json", rng)
    else:
        target = _damaged(pair.target, folder, files, rng)
    return _asked(target, pair.draft, rng), b""


def _move_ids(file: Path, rng: Random) -> None:
    """Give a tokenizer's tokens other ids: all, some, or its special ones."""
    content = json.loads(file.read_bytes())
    shift = rng.choice((1, -1, 7, 100, 1000, 10**6, 2**31, 2**32 - 1))
    share = rng.choice((1.0, 1.0, 0.2))
    vocabulary = content["model"]["vocab"]
    if rng.random() < 0.7:
        for word in vocabulary:
            if rng.random() < share:
                vocabulary[word] += shift
    if rng.random() < 0.7:
        for token in content["added_tokens"]:
            if rng.random() < share:
                token["id"] += shift
    file.write_text(json.dumps(content))


ROWS: dict[str, list[Any]] = {
    "bench": [
        {"prompt": "One two", "kind": "a"},
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]},
    ],
    "train": [
        {"text": "One two three four five six seven eight nine ten. " * 2},
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "One two three."},
            ],
            "tools": [],
        },
        {"prompt": "hi", "completion": "One two"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "One"}]},
    ],
    "chat": [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "One"}]},
    ],
}


def _prompts(rng: Random, bases: Bases, folder: Path) -> Command:
    pair = bases.pair("tiny")
    command = rng.choice(("bench", "bench", "chat", "chat-stdin", "generate", "train"))
    common = ["-m", str(pair.target), "--draft", str(pair.draft), "--max-tokens", "4"]
    common += ["--verify-length", "3"]
    if command == "generate":
        text = mutate_bytes("One two, größer 🙂\n".encode(), rng)
        return ["generate", *common], text
    if command == "chat-stdin":
        return ["chat", *common], _typed(rng)
    rows = [row if rng.random() < 0.5 else mutate_tree(row, rng) for row in ROWS[command]]
    text = b"\n".join(json.dumps(row).encode("utf-8", "surrogatepass") for row in rows)
    file = folder / "rows.jsonl"
    file.write_bytes(mutate_bytes(text, rng) if rng.random() < 0.3 else text)
    if command == "bench":
        return ["bench", *common, "--prompts", str(file), "--repeats", "1"], b""
    if command == "chat":
        return ["chat", *common, "--resume", str(file)], b"hi\n"
    return [
        "train", "-m", str(pair.target), "--data", str(file), "-o", str(folder / "trained"),
        "--steps", "1", "--draft-layers", "1", "--block-size", "4", "--seq-length", "32",
    ], b""  # fmt: skip


def _typed(rng: Random) -> bytes:
    """Lines typed into a chat: its commands with odd arguments, and text."""
    words = ["/help", "/clear", "/system", "/save", "/load", "/undo", "/retry", "/stats", "/set",
             "/temp", "/think", "/quit", "/x", "/", '"""', "hi", "", "/retry 3"]  # fmt: skip
    ends = ["", " 1", " -1", " x", " nan", " /nowhere/x", " temp 1e400", " 🙂", " {", " " * 50]
    lines = [rng.choice(words) + rng.choice(ends) for _ in range(rng.randrange(1, 6))]
    text = "\n".join(lines).encode()
    return mutate_bytes(text, rng) if rng.random() < 0.2 else text


# What takes as long as it is told to, and what would write into the working directory.
_LEFT_OUT = {"repeats", "cooldown", "max_tokens", "steps", "regenerate", "help", "host", "port"}
_COMMANDS = ("generate", "bench", "chat", "convert", "models")
_TEXTS = ["", "x", "-1", "0", "1", "2", "3", "7", "64", "127", "1024", "5000", "1e9", "1e400",
          "nan", "inf", "-inf", "0.5", "1.5", "9" * 400, str(2**31), str(2**63), str(2**64),
          "auto", "off", "\ud800", "a\x00b", "/nowhere/x", "/dev/null", "/dev/full", ".", "a/b",
          "{}", "[]", '{"a": 1}', '{"enable_thinking": []}', "[" * 1000, '{"a":' * 1000, "4", "8",
          "<|end|>", "demo", "1k,2k", "1.svg", "*", "fc", "affine", "mxfp4", "float32"]  # fmt: skip


def _options(rng: Random, bases: Bases, folder: Path) -> Command:
    name = rng.choice(_COMMANDS)
    pair = bases.pair(rng.choice(("tiny", "quantized")))
    group: Any = typer.main.get_command(app)
    parameters = [p for p in group.commands[name].params if p.name not in _LEFT_OUT and p.opts]
    named = {"generate": ["-p", "hi"], "bench": ["--repeats", "1"], "chat": []}
    command = [name]
    if name in named:
        command += ["-m", str(pair.target), "--draft", str(pair.draft), *named[name]]
        command += ["--max-tokens", "6", "--verify-length", "3"]
    elif name == "convert":
        command += [str(pair.draft), "-o", str(folder / "out"), "--bits", "8"]
    elif rng.random() < 0.7:
        command += ["--inspect", str(rng.choice((pair.target, pair.draft)))]
    if name == "bench":
        (folder / "p.jsonl").write_text('{"prompt": "One two"}\n')
        command += ["--prompts", str(folder / "p.jsonl")]
    for _ in range(rng.choice((1, 1, 2, 3))):
        option = rng.choice(parameters)
        if not option.opts[0].startswith("-"):
            continue
        command.append(rng.choice([*option.opts, *option.secondary_opts]))
        if not getattr(option, "is_flag", False):
            command.append(rng.choice(_TEXTS))
    return command, rng.choice((b"", b"hi\n", b"/stats\nhi\n"))


KINDS: dict[str, Callable[[Random, Bases, Path], Command]] = {
    "draft": _draft,
    "target": _target,
    "tokenizer": _tokenizer,
    "prompts": _prompts,
    "options": _options,
}

__all__ = ["KINDS", "Bases", "Sound", "build", "spread"]
