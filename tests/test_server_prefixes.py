"""Second turns over the server's own prompts: only what is new is run, with thinking and tools."""

import json
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from dflash_mlx.api import make_decoder
from dflash_mlx.conversation import Template
from dflash_mlx.decode import Options
from dflash_mlx.server.asks import Ask, Tools
from dflash_mlx.server.engine import Engine
from dflash_mlx.server.job import Job
from dflash_mlx.server.prompts import Prompts
from tests.engine_client import Client
from tests.families.configs import CONFIGS, VOCAB
from tests.test_conversation import FAMILIES, pair
from tests.tiny_pair import vocabulary, write_tokenizer

OPTIONS = Options(max_tokens=12)
# Thinking is kept from the last question on, as Qwen's templates have it.
TEMPLATE = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for t in tools or [] %}<|start|>tool {{ t.function.name }}<|end|>\n{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined %}<think>\n"
    "{% if not enable_thinking %}\n</think>\n{% endif %}{% endif %}{% endif %}{# tool_call.name #}"
)
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "", "parameters": {"type": "object"}},
}
CALL: Any = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {}}}


def said(role: str, content: str, **more: Any) -> Any:
    return {"role": role, "content": content, **more}


THOUGHT = "So it is."
TALK = [
    said("system", "Be kind."),
    said("user", "A first question, of some length."),
    said("assistant", "An answer.", reasoning_content=THOUGHT),
    said("user", "And a second one?"),
]
STEPS = [
    *TALK[:2],
    said("assistant", "", reasoning_content=THOUGHT, tool_calls=[CALL]),
    said("tool", "Rain, and more rain, all day long."),
    said("assistant", "", reasoning_content="Again.", tool_calls=[CALL]),
    said("tool", "Sun."),
    said("assistant", "Sun, then.", reasoning_content="Good."),
    said("user", "Thanks."),
]
# The turns that are asked: how many of the messages each one sends.
SHAPES: dict[str, tuple[list[Any], list[int], list[Any]]] = {
    "talk": (TALK, [2, 4], []),
    "tools": (STEPS, [2, 4, 6, 8], [WEATHER]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = [*vocabulary(""), "ä", "ö", "ü"][:VOCAB]
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, words)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"chat_template": TEMPLATE}
    file.write_text(json.dumps(settings))
    return load_tokenizer(folder)


def common(one: Any, other: Any) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def check(family: str, tokenizer: Any) -> None:
    model = pair(family)
    # Arrays belong to the thread that makes them.
    engine = Engine(lambda: (pair.__wrapped__(family), tokenizer), cache_bytes=1 << 28)
    engine.start()
    prompts = Prompts(Template(tokenizer))
    try:
        for name, (messages, turns, tools) in SHAPES.items():
            for think in (None, True, False):
                before: tuple[int, ...] = ()
                # Each conversation is another one from its first word on.
                own = [said("system", f"{name} {think}"), *messages[1:]]
                for count in turns:
                    ask = Ask(messages=own[:count], tools=Tools(tools), think=think)
                    prompt = prompts.make(ask)
                    job = Job(
                        tuple(prompt.tokens),
                        OPTIONS.max_tokens,
                        prompt.boundaries,
                        prompt.own,
                        stop_tokens=frozenset(),
                        verify_length=2,
                    )
                    client = Client(engine, job)
                    event = client.end()
                    assert client.started is not None
                    # What the template repeats of the last prompt, but for how an answer begins.
                    kept = common(before, job.prompt)
                    begins = len(tokenizer.encode("<|start|>assistant\n<think>\n\n</think>\n"))
                    at = (family, name, think, count)
                    assert client.started.cached >= kept - begins, at
                    # As it would be afresh: the text, and what the draft is worth.
                    decoder = make_decoder(model, model.make_cache(), OPTIONS, 2)
                    assert client.ids == [t.id for t in decoder.run(prompt.tokens)], at
                    fresh = decoder.statistics.acceptance_length
                    assert event.figures.acceptance_length == fresh, at
                    before = job.prompt
    finally:
        engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_run_only_what_is_new(family, tokenizer) -> None:
    check(family, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - set(FAMILIES)))
def test_turns_of_every_family(family, tokenizer) -> None:
    check(family, tokenizer)
