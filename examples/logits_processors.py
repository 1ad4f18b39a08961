"""Sampling with logits processors: the text is plain mlx_lm's, processors and all.

python examples/logits_processors.py [TARGET [DRAFT]]
"""

import sys

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

from dflash_mlx import generate, load, make_sampler
from dflash_mlx.demo import demo_paths

PROMPT = "Hello, I am Mira from Tolvek."


def main() -> None:
    model, tokenizer = load(*(sys.argv[1:] or demo_paths()))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )
    comma = tokenizer.encode(",", add_special_tokens=False)[-1]

    def no_commas(tokens: mx.array, logits: mx.array) -> mx.array:
        """Each row [1, V] is shown to a processor with the tokens [n] before it."""
        logits[:, comma] = -float("inf")
        return logits

    for processors in ([], [no_commas], make_logits_processors(repetition_penalty=1.5)):
        mx.random.seed(7)
        text = generate(
            model,
            tokenizer,
            prompt,
            max_tokens=60,
            sampler=make_sampler(0.7, top_p=0.95),
            logits_processors=processors,
        )
        print(text)


if __name__ == "__main__":
    main()
