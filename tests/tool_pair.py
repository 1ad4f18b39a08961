"""A tiny pair that calls a tool, and answers when it has the result, as users have it on disk."""

import itertools
import json
import re
from pathlib import Path

import mlx.core as mx

from tests.tiny_pair import spoken, vocabulary, write_draft, write_target

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
ANSWER = "It rains all day long over there."
# What an answer begins behind says which one it is.
_ASKED, _TOLD = "\n", "~"
TEMPLATE = (
    "{% for t in tools or [] %}<|start|>tool {{ t.function.name }}<|end|>\n{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant"
    "{% if tools and messages[-1].role != 'tool' %}{{ '\n' }}{% else %}~{% endif %}{% endif %}"
    "{# tool_call.name #}"
)


def write_tool_pair(
    folder: Path, call: str = CALL, answer: str = ANSWER, *, agents: bool = False
) -> tuple[Path, Path]:
    """Write `target` and `draft` directories.

    The target calls where there are tools; without any, or with a call's result, it answers. For
    `agents`, whose prompts are long, it has more positions, and a token for every word.
    """
    both = f"{answer} {call}"
    words, said = vocabulary(both), spoken(both)
    positions = 65536 if agents else 8192
    target, draft = folder / "target", folder / "draft"
    write_target(target, both, max_position_embeddings=positions)
    write_draft(draft, len(words))
    weights = mx.load(str(target / "model.safetensors"))
    assert isinstance(weights, dict)
    length = len(spoken(answer))
    chains = [(_ASKED, *said[length:], "<|end|>"), (_TOLD, *said[:length], "<|end|>")]
    embedding = weights["model.embed_tokens.weight"]
    head = [mx.zeros(embedding.shape[1])] * len(words)
    for chain in chains:
        for word, following in itertools.pairwise(chain):
            row = words.index(following)
            head[row] = head[row] + embedding[words.index(word)]
    weights["lm_head.weight"] = mx.stack(head)
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    settings = json.loads((target / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "tool_parser_type": "json_tools"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    if agents:
        _read_whole_words(target, [word for word in words if len(word) > 1])
    return target, draft


def _read_whole_words(target: Path, known: list[str]) -> None:
    """Let the tokenizer take any word for one token, most of them unknown, not for its letters."""
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    longest = sorted((w for w in known if not w.startswith("<|")), key=len, reverse=True)
    pattern = "|".join(re.sub(r"([^\w\s])", r"\\\1", word) for word in longest)
    tokenizer["pre_tokenizer"]["pattern"]["Regex"] = pattern + r"|\n|~|[^\S\n]+|\w+"
    file.write_text(json.dumps(tokenizer))
