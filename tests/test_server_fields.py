"""From the fields of requests to how tokens are drawn and prompts are made."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_mlx.conversation import Template
from dflash_mlx.server.asks import Ask
from dflash_mlx.server.fields import Fields
from dflash_mlx.server.job import Sampling
from dflash_mlx.server.prompts import Prompts
from dflash_mlx.server.sampling_fields import sampling
from tests.serving import tool_tokenizer


@pytest.mark.parametrize(
    ("body", "chosen"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 3}, {"top_p": 0.9}),
        ({"temperature": 1e-9}, {"temperature": 0.0}),
        ({"top_p": 0}, {"top_p": 1.0, "top_k": 1}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"logit_bias": {"7": -100}}, {"logit_bias": ((7, -100.0),)}),
        ({"temperature": None}, {"temperature": 0.3}),
    ],
)
def test_sampling(body: Any, chosen: dict[str, Any]) -> None:
    defaults = Sampling(temperature=0.3)
    found = sampling(Fields(body), defaults)
    expected = replace(defaults, **{k: v for k, v in body.items() if k in ("temperature", "seed")})
    if body.get("temperature", 0) is None:
        expected = defaults
    assert found == replace(expected, **chosen)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    return tool_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@given(
    system=st.text("ab c", max_size=30),
    said=st.lists(st.text("One two\n", min_size=1, max_size=12), min_size=1, max_size=5),
)
def test_boundaries_are_where_whole_prompts_part(tokenizer, system, said) -> None:
    """The quick way to find them agrees with encoding both prompts as a whole."""
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for i, text in enumerate(said if len(said) % 2 else said[:-1] or said):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    prompt = Prompts(Template(tokenizer)).make(Ask(messages=messages))
    template = Template(tokenizer)

    def shared(other: list[Any]) -> int:
        theirs = template.render(other)
        pairs = zip(prompt.tokens, theirs, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        return min(len(prompt.tokens) if same is None else same, len(prompt.tokens) - 1)

    answer, question = {"role": "assistant", "content": "."}, {"role": "user", "content": "."}
    expected = {shared([*messages, answer, question])}
    if system:
        expected.add(shared([messages[0], {"role": "user", "content": ""}]))
    assert prompt.boundaries == tuple(sorted(b for b in expected if b > 0))


@pytest.mark.parametrize(
    ("effort", "template", "ending"),
    [
        ("none", "{{ enable_thinking }}", "False"),
        ("max", "{{ reasoning_effort }}", "high"),
        ("low", "{{ reasoning_effort }}", "low"),
    ],
)
def test_efforts(tmp_path, effort: str, template: str, ending: str) -> None:
    tokenizer = tool_tokenizer(tmp_path)
    tokenizer.chat_template = template
    ask = Ask(messages=[{"role": "user", "content": "x"}], effort=effort)
    prompt = Prompts(Template(tokenizer)).make(ask)
    assert tokenizer.decode(prompt.tokens) == ending


def test_messages_that_a_template_refuses_are_joined(tmp_path) -> None:
    tokenizer = tool_tokenizer(tmp_path)
    strict = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('System first.') }}{% endif %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    tokenizer.chat_template = strict
    messages: list[Any] = [
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "system", "content": "d"},
    ]
    prompt = Prompts(Template(tokenizer)).make(Ask(messages=messages))
    assert tokenizer.decode(prompt.tokens) == "system:a\n\nb;user:c\n\nd;"
