"""Score a demo pair: `python -m dflash_mlx.demo.making.check [DIRECTORY]`.

For every kind and split: how many answers of the real decode loop are exactly right, and the
acceptance length. Without a directory, the pair of this package.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_mlx.api import load, stream_generate
from dflash_mlx.demo import demo_paths
from dflash_mlx.demo.making.text import KINDS, Example, example


@dataclass
class Score:
    """Counts over the examples of one kind."""

    examples: int = 0
    right: int = 0
    tokens: int = 0
    forwards: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens after each answer's first one per target forward."""
        return (self.tokens - self.examples) / max(1, self.forwards)

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.examples + other.examples,
            self.right + other.right,
            self.tokens + other.tokens,
            self.forwards + other.forwards,
        )


def score(model: Any, tokenizer: Any, examples: Iterable[Example], **options: Any) -> Score:
    """Answer the examples greedily with a SpeculativeModel; options go to stream_generate."""
    total = Score()
    for item in examples:
        prompt = tokenizer.apply_chat_template(
            item.prompt, add_generation_prompt=True, return_dict=False
        )
        text, last = "", None
        for last in stream_generate(model, tokenizer, prompt, max_tokens=256, **options):
            text += last.text
        assert last is not None
        right = text == item.answer and last.finish_reason == "stop"
        total += Score(1, int(right), last.generation_tokens, last.target_forwards)
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, nargs="?", help="holds target/ and draft/")
    parser.add_argument("--count", type=int, default=40, help="examples of each kind and split")
    arguments = parser.parse_args()
    if arguments.directory is None:
        target, draft = demo_paths()
    else:
        target, draft = arguments.directory / "target", arguments.directory / "draft"
    model, tokenizer = load(target, draft)
    print(f"{'split':10}{'kind':12}{'right':>8}{'acceptance':>12}")
    for split in ("held-out", "novel"):
        whole = Score()
        for kind in KINDS:
            examples = (example(kind, split, seed) for seed in range(arguments.count))
            part = score(model, tokenizer, examples)
            whole += part
            _print(split, kind, part)
        _print(split, "all", whole)


def _print(split: str, kind: str, part: Score) -> None:
    share = part.right / part.examples
    print(f"{split:10}{kind:12}{share:>8.0%}{part.acceptance_length:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
