"""Make the demo pair from its seeds: `python -m dflash_mlx.training.demo_pair DIRECTORY`.

Tokenizer, target, the target's own answers, draft: each step finds what an interrupted run left
in the directory and goes on there. DIRECTORY then holds what `dflash_mlx/demo` does: target/,
draft/ and the bench's prompts.jsonl.
"""

import argparse
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer

from dflash_mlx.training.demo_draft import draft_samples, train_draft
from dflash_mlx.training.demo_prompts import write_prompts
from dflash_mlx.training.demo_target import save_target, train_target
from dflash_mlx.training.demo_text import early_example
from dflash_mlx.training.demo_tokenizer import save_tokenizer, train_tokenizer
from dflash_mlx.training.trainer import TrainingOptions

DRAFT_SAMPLES = 16000
DRAFT = TrainingOptions(
    steps=5000,
    tokens_per_batch=2048,
    anchors=16,
    learning_rate=3e-3,
    warmup=200,
    gamma=7.0,
    seed=1,
)


def make_demo_pair(directory: Path, draft: TrainingOptions = DRAFT) -> None:
    """Train target and draft into `directory`; the same versions give the same pair."""
    mx.set_default_device(mx.cpu)
    target = directory / "target"
    if not (target / "tokenizer.json").exists():
        examples = (early_example(f"tokenizer/{i}") for i in range(20000))
        texts = (message["content"] for example in examples for message in example.messages)
        save_tokenizer(train_tokenizer(texts), target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    if not (target / "model.safetensors").exists():
        save_target(train_target(tokenizer, directory), target)
    samples = draft_samples(target, directory / "answers.npz", DRAFT_SAMPLES, print)
    train_draft(target, directory, samples, draft)
    write_prompts(directory / "prompts.jsonl")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="where the pair and the run's state go")
    parser.add_argument("--draft-steps", type=int, default=DRAFT.steps)
    arguments = parser.parse_args()
    options = TrainingOptions(**{**vars(DRAFT), "steps": arguments.draft_steps})
    make_demo_pair(arguments.directory, options)


if __name__ == "__main__":
    main()
