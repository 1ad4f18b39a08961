"""What the tests of training share: a small plan, rows of data, and what a run has left."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load as load_plain
from mlx_lm import stream_generate as stream_plain

from dflash_mlx import load_draft

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

WHOLE = {
    "README.md",
    "config.json",
    "model.safetensors",
    "training/log.jsonl",
    "training/options.json",
    "training/state.safetensors",
}


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


def plainly(target: Path, prompt: Any, most: int) -> list[int]:
    """The tokens that mlx_lm writes greedily."""
    model, tokenizer = load_plain(str(target))[:2]
    return [r.token for r in stream_plain(model, tokenizer, prompt, max_tokens=most)]
