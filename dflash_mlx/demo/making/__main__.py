"""Make what the demo draft is trained from: `python -m dflash_mlx.demo.making DIRECTORY`.

Tokenizer, target, requests: each step finds what an interrupted run left in the directory and goes
on there. DIRECTORY then holds target/, the bench's prompts.jsonl, and requests.jsonl, from which
`dflash-mlx train` makes the draft; dflash_mlx/demo/README.md has the command.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer

from dflash_mlx.demo.making.prompts import write_prompts
from dflash_mlx.demo.making.target import save_target, train_target
from dflash_mlx.demo.making.text import early_example, training_example
from dflash_mlx.demo.making.tokenizer import save_tokenizer, train_tokenizer

REQUESTS = 24000


def make_demo_target(directory: Path) -> None:
    """Train the target into `directory`; the same versions give the same one."""
    mx.set_default_device(mx.cpu)
    target = directory / "target"
    if not (target / "tokenizer.json").exists():
        examples = (early_example(f"tokenizer/{i}") for i in range(20000))
        texts = (message["content"] for example in examples for message in example.messages)
        save_tokenizer(train_tokenizer(texts), target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    if not (target / "model.safetensors").exists():
        save_target(train_target(tokenizer, directory), target)


def write_requests(file: Path, count: int) -> None:
    """Conversations of the demo's kinds, one on a line, as `dflash-mlx train` reads them."""
    rows = (json.dumps({"messages": training_example(f"draft/{i}").messages}) for i in range(count))
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="where all this goes")
    parser.add_argument(
        "--requests-only", action="store_true", help="write requests.jsonl and nothing else"
    )
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    write_requests(arguments.directory / "requests.jsonl", REQUESTS)
    if not arguments.requests_only:
        write_prompts(arguments.directory / "prompts.jsonl")
        make_demo_target(arguments.directory)


if __name__ == "__main__":
    main()
