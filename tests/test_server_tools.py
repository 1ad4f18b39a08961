"""Calls of every format over HTTP: streamed and whole, demanded and malformed, by every API."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from dflash_mlx.server.calls import Call
from tests.serving import events, post, saying
from tests.test_harmony import harmony_tokenizer
from tests.test_server_channels import TOOLS, WRITTEN, plain, read, writer
from tests.tiny_pair import vocabulary, write_tokenizer

ARGUMENTS = {"city": "Oslo", "days": 2}
HELLO: Any = [{"role": "user", "content": "Hello"}]
FUNCTION: Any = TOOLS[0]["function"]
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": HELLO, "tools": TOOLS},
    "/v1/messages": {
        "messages": HELLO,
        "max_tokens": 500,
        "tools": [{"name": "weather", "input_schema": FUNCTION["parameters"]}],
    },
    "/v1/responses": {"input": HELLO, "tools": [{"type": "function", **FUNCTION}]},
}
# How each API demands a call of any tool, and of this one.
DEMANDS: dict[str, tuple[Any, Any]] = {
    "/v1/chat/completions": ("required", {"type": "function", "function": {"name": "weather"}}),
    "/v1/messages": ({"type": "any"}, {"type": "tool", "name": "weather"}),
    "/v1/responses": ("required", {"type": "function", "name": "weather"}),
}
HARMONY = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
    ' to=functions.weather <|constrain|>json<|message|>{"city": "Oslo", "days": 2}<|call|>'
)


def calling(folder: Any, name: str) -> TokenizerWrapper:
    """A tokenizer of a model that writes its calls in one of mlx_lm's formats."""
    write_tokenizer(folder, vocabulary(""))
    file = folder / "tokenizer_config.json"
    before, after = WRITTEN[name].split("weather", 1)
    call = f"{{{{ {json.dumps(before)} }}}}{{{{ c.function.name }}}}{{{{ {json.dumps(after)} }}}}"
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
        f"{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}<|end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}{# think #}"
    )
    settings = json.loads(file.read_text())
    settings |= {"tool_parser_type": name, "chat_template": template}
    file.write_text(json.dumps(settings))
    return load_tokenizer(folder)


Found = tuple[str, str, list[tuple[str, Any]]]


def whole(path: str, answer: Any) -> Found:
    """Thinking, text and calls of an answer in one piece."""
    if path == "/v1/chat/completions":
        message = answer["choices"][0]["message"]
        calls = [c["function"] for c in message.get("tool_calls", [])]
        found = [(c["name"], json.loads(c["arguments"])) for c in calls]
        return message.get("reasoning_content", ""), message["content"] or "", found
    parts = answer["content" if path == "/v1/messages" else "output"]
    kinds: dict[str, list[Any]] = {"text": [], "thinking": [], "call": []}
    for part in parts:
        if part["type"] == "tool_use":
            kinds["call"].append((part["name"], part["input"]))
        elif part["type"] == "function_call":
            kinds["call"].append((part["name"], json.loads(part["arguments"])))
        elif path == "/v1/messages":
            kinds[part["type"]].append(part[part["type"]])
        else:
            kind = "thinking" if part["type"] == "reasoning" else "text"
            kinds[kind].append(part["content"][0]["text"])
    return "".join(kinds["thinking"]), "".join(kinds["text"]), kinds["call"]


def streamed(path: str, stream: list[Any]) -> Found:
    """The same, put together from the deltas of a stream."""
    thinking = text = ""
    names: dict[Any, str] = {}
    arguments: dict[Any, str] = {}
    for event in stream:
        if path == "/v1/chat/completions":
            delta = event["choices"][0]["delta"]
            thinking += delta.get("reasoning_content", "")
            text += delta.get("content") or ""
            for call in delta.get("tool_calls", []):
                at = call["index"]
                names[at] = names.get(at, "") + (call["function"].get("name") or "")
                arguments[at] = arguments.get(at, "") + call["function"]["arguments"]
        elif path == "/v1/messages":
            delta, at = event.get("delta", {}), event.get("index")
            thinking += delta.get("thinking", "")
            text += delta.get("text", "")
            if event.get("content_block", {}).get("type") == "tool_use":
                names[at] = event["content_block"]["name"]
            if "partial_json" in delta:
                arguments[at] = arguments.get(at, "") + delta["partial_json"]
        else:
            at, kind = event.get("output_index"), event["type"]
            thinking += event["delta"] if kind == "response.reasoning_text.delta" else ""
            text += event["delta"] if kind == "response.output_text.delta" else ""
            if kind == "response.output_item.added" and event["item"]["type"] == "function_call":
                names[at] = event["item"]["name"]
            if kind == "response.function_call_arguments.delta":
                arguments[at] = arguments.get(at, "") + event["delta"]
    return thinking, text, [(names[at], json.loads(arguments[at])) for at in names]


def both(address: str, path: str, body: Any) -> Found:
    """What an answer holds, which is the same whole and streamed."""
    answer = whole(path, post(address, path, body).json())
    assert streamed(path, events(post(address, path, {**body, "stream": True}))) == answer
    return answer


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.parametrize("cycle", [1, 7])
def test_streamed_is_whole(tmp_path, name: str, cycle: int) -> None:
    text = f"<think>Hm.</think>\n\nI look.\n{WRITTEN[name]}"
    with saying(calling(tmp_path, name), text, cycle=cycle) as (address, _):
        for path, body in BODIES.items():
            assert both(address, path, body) == ("Hm.", "I look.", [("weather", ARGUMENTS)])


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_calls_that_are_demanded(tmp_path, name: str) -> None:
    """The prompt begins the call as the format has it, and the answer goes on from there."""
    tokenizer, text = calling(tmp_path, name), WRITTEN[name]
    behind = text.removeprefix(tokenizer.tool_call_start)
    called = ("", "", [("weather", ARGUMENTS)])
    with saying(tokenizer, behind) as (address, _):
        for path, body in BODIES.items():
            assert both(address, path, {**body, "tool_choice": DEMANDS[path][0]}) == called
    with saying(tokenizer, text.split("weather", 1)[1]) as (address, engine):
        for path, body in BODIES.items():
            assert both(address, path, {**body, "tool_choice": DEMANDS[path][1]}) == called
            begun = text.split("weather")[0] + "weather"
            assert tokenizer.decode(engine.jobs[-1].prompt).endswith(begun)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_none_means_text(tmp_path, name: str) -> None:
    text = f"I look. {WRITTEN[name]}"
    with saying(calling(tmp_path, name), text) as (address, _):
        for path, body in BODIES.items():
            none = {"type": "none"} if path == "/v1/messages" else "none"
            assert both(address, path, {**body, "tool_choice": none}) == ("", text, [])


def test_harmony(tmp_path) -> None:
    tokenizer = harmony_tokenizer(tmp_path)
    with saying(tokenizer, HARMONY, cycle=2) as (address, _):
        for path, body in BODIES.items():
            assert both(address, path, body) == ("Hm.", "", [("weather", ARGUMENTS)])
    _, _, rest = HARMONY.partition("functions.")
    for way, behind in enumerate((rest, rest.partition("<|message|>")[2])):
        with saying(tokenizer, behind, cycle=2) as (address, _):
            for path, body in BODIES.items():
                demand = {**body, "tool_choice": DEMANDS[path][way]}
                assert both(address, path, demand) == ("", "", [("weather", ARGUMENTS)])


@pytest.mark.parametrize("name", sorted(WRITTEN))
@given(at=st.integers(0, 300), length=st.integers(1, 60), put=st.text('<>/"{}[]:, \n', max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_call_is_text_or_still_a_call(caplog, name, at, length, put) -> None:
    """Never an error, and nothing lost: what is no call is passed on as it was written."""
    written, tokenizer = WRITTEN[name], writer(name)
    first = len(tokenizer.tool_call_start)
    last = len(written) - len(tokenizer.tool_call_end)
    at = first + at % (last - first)
    damaged = written[:at] + put + written[min(at + length, last) :]
    caplog.clear()
    pieces, channels = read(tokenizer, [damaged])
    if channels.called:
        for called, arguments in plain([p for p in pieces if isinstance(p, Call)]):
            assert called and isinstance(arguments, dict)
    else:
        assert "".join(text for _, text in plain(pieces)) == damaged
        assert "malformed tool call" in caplog.text
