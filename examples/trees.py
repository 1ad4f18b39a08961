"""Tokens per forward of the target for lines and for trees of several sizes, counted and drawn.

    python examples/trees.py trees.svg [--model TARGET [--draft DRAFT]] [--max-tokens N]

Every prompt is answered with the whole block as a line and with trees. The text is the same each
time; what changes is how many forwards it takes. Nothing is timed: rows cost time, and `dflash-mlx
bench --tree N` says what a tree is worth on a machine. Without a target the demo pair runs, on its
own kinds of text.
"""

import argparse
from pathlib import Path
from typing import Any

from dflash_mlx import load, stream_generate
from dflash_mlx.cli.chart import check_format, write_bars
from dflash_mlx.demo import demo_paths
from dflash_mlx.measure.machine import machine
from dflash_mlx.measure.prompts import builtin_questions, demo_questions

NODES = (4, 8, 16, 32, 64)


def count(model: Any, tokenizer: Any, prompts: list[list[int]], **options: Any) -> float:
    """Tokens per forward over all prompts, first tokens left out."""
    tokens = forwards = 0
    for prompt in prompts:
        *_, last = stream_generate(model, tokenizer, prompt, **options)
        tokens += last.generation_tokens - 1
        forwards += last.target_forwards
    return tokens / forwards


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--draft")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=24, help="at most so many")
    arguments = parser.parse_args()
    check_format(arguments.file)
    target, draft = demo_paths()
    questions = builtin_questions() if arguments.model else demo_questions(("held-out",))
    if arguments.model:
        target, draft = arguments.model, arguments.draft
    model, tokenizer = load(target, draft)
    step = max(len(questions) // arguments.prompts, 1)
    prompts = [
        tokenizer.apply_chat_template(list(q.messages), add_generation_prompt=True)
        for q in questions[::step][: arguments.prompts]
    ]
    found = {}
    for nodes in (0, *NODES):
        name = f"tree of {nodes}" if nodes else f"line of {model.draft.most_proposals}"
        options = {"max_tokens": arguments.max_tokens, "verify_length": None, "tree": nodes}
        found[name] = count(model, tokenizer, prompts, **options)
        print(f"{name:12}{found[name]:7.2f} tokens per forward", flush=True)
    pair = Path(arguments.model).name if arguments.model else "demo pair"
    bars = {name: (length, f"{length:.2f}") for name, length in found.items()}
    write_bars(arguments.file, f"Tokens per forward of the target: {pair}", bars, machine())


if __name__ == "__main__":
    main()
