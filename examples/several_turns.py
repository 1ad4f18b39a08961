"""Several turns with one cache, kept on disk in between: every turn runs only what is new.

python examples/several_turns.py [TARGET [DRAFT]]
"""

import sys
import tempfile
from pathlib import Path

from dflash_mlx import (
    load,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    stream_generate,
)
from dflash_mlx.demo import demo_paths

ASKED = (
    "Hello, I am Mira from Tolvek.",
    "Please give me 14 green candles.",
    "No, send them to Kroze.",
)


def main() -> None:
    model, tokenizer = load(*(sys.argv[1:] or demo_paths()))
    messages: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "conversation.safetensors")
        save_prompt_cache(file, make_prompt_cache(model))
        for asked in ASKED:
            # The draft's context is in the file too, so acceptance is what it was.
            cache = load_prompt_cache(file)
            messages.append({"role": "user", "content": asked})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            new = prompt[len(cache.tokens) :]
            text = ""
            for response in stream_generate(model, tokenizer, new, prompt_cache=cache):
                text += response.text
            print(f"{text}\n[{len(new)} of {len(prompt)} prompt tokens run]")
            messages.append({"role": "assistant", "content": text})
            save_prompt_cache(file, cache)


if __name__ == "__main__":
    main()
