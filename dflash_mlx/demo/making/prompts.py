"""The demo pair's bench prompts: kinds that it knows, novel words, and what it is bad at."""

import json
from pathlib import Path

from dflash_mlx.demo.making.text import KINDS, example

# Nothing like them is in the training text: the answers are wrong and acceptance is low.
BAD = {
    "random words": (
        "Umbrella seventeen quietly the because marble onto Tuesday.",
        "xk9 vv plonk ~~ 3.14 [] hm? zzz",
    ),
    "other language": (
        "Wie spät ist es in Hamburg, und warum regnet es dort so oft?",
        "Raconte-moi une courte histoire de la mer.",
        "今日はいい天気ですね。",
    ),
    "open question": (
        "Why is the sky blue?",
        "Write a poem about the first snow of the winter.",
    ),
}


def bench_prompts() -> list[dict]:
    """The rows of prompts.jsonl: five held-out and three novel prompts of each kind, and BAD."""
    rows = [
        {"set": split, "kind": kind, "messages": example(kind, split, f"bench/{i}").prompt}
        for split, count in (("held-out", 5), ("novel", 3))
        for kind in KINDS
        for i in range(count)
    ]
    rows += [
        {"set": "bad", "kind": kind, "messages": [{"role": "user", "content": text}]}
        for kind, texts in BAD.items()
        for text in texts
    ]
    return rows


def write_prompts(file: Path) -> None:
    """Write prompts.jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) for row in bench_prompts()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
