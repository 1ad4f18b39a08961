"""A chat in thirty lines: what the draft wrote in green, and what a forward of the target yields.

    python examples/chat_loop.py [TARGET [DRAFT]]

Without a target it talks to the demo pair, which knows a shop: try "Hello, I am Mira from Tolvek."
"""

import sys

from dflash_mlx import load, make_prompt_cache, stream_generate
from dflash_mlx.demo import demo_paths

GREEN, PLAIN = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "")


def main() -> None:
    model, tokenizer = load(*(sys.argv[1:] or demo_paths()))
    cache = make_prompt_cache(model)
    messages: list[dict[str, str]] = []
    print("> ", end="", flush=True)
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.rstrip("\n")})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        # The cache stands for what was said before; only the rest is run.
        known = len(cache.tokens)
        if prompt[:known] != cache.tokens:
            cache, known = make_prompt_cache(model), 0
        text = ""
        for response in stream_generate(model, tokenizer, prompt[known:], prompt_cache=cache):
            colour = GREEN if response.from_draft else PLAIN
            print(f"{colour}{response.text}{PLAIN}", end="", flush=True)
            text += response.text
        print(f"\n[acceptance length {response.acceptance_length:.2f}]\n> ", end="", flush=True)
        messages.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    main()
