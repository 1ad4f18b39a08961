"""Programs that people use, against a server with a model behind it, over loopback."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from dflash_mlx import load
from dflash_mlx.conversation import Template
from dflash_mlx.server.engine import Engine
from dflash_mlx.server.prompts import Prompts
from dflash_mlx.server.service import Service
from tests.serving import serving
from tests.tool_pair import ANSWER, CALL, write_tool_pair

ASK: Any = [{"role": "user", "content": "How is the weather in Oslo?"}]
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
ARGUMENTS = json.loads(CALL.removeprefix("<tool_call>").removesuffix("</tool_call>"))["arguments"]


@contextmanager
def served(target: Path, draft: Path) -> Iterator[str]:
    """A server for a pair on disk; gives its address."""
    engine = Engine(lambda: load(target, draft), cache_bytes=10**8)
    engine.start()
    try:
        prompts = Prompts(Template(engine.tokenizer))
        with serving(Service(engine, prompts, model="tiny", draft="tiny draft")) as address:
            yield address
    finally:
        engine.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(*write_tool_pair(tmp_path_factory.mktemp("pair"))) as address:
        yield address


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_openai_chat(client) -> None:
    answer = client.chat.completions.create(model="gpt-4", messages=ASK)
    assert answer.choices[0].message.content == ANSWER
    assert answer.model == "tiny"
    assert answer.x_dflash["acceptance_length"] >= 1
    stream = client.chat.completions.create(
        model="gpt-4", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ANSWER
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    plain = client.completions.create(model="x", prompt="~", max_tokens=3)
    assert ANSWER.startswith(plain.choices[0].text) and plain.choices[0].text


def test_openai_tools_over_two_steps(client) -> None:
    first = client.chat.completions.create(model="x", messages=ASK, tools=[WEATHER])
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == ARGUMENTS
    with client.chat.completions.stream(model="x", messages=ASK, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert streamed.choices[0].finish_reason == "tool_calls"
    assert streamed.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*ASK, first.choices[0].message, result]
    second = client.chat.completions.create(model="x", messages=history, tools=[WEATHER])
    assert second.choices[0].message.content == ANSWER


def test_openai_responses(client) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}]
    with client.responses.stream(model="x", input=ASK, tools=tools) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    call = first.output[0]
    assert call.type == "function_call" and json.loads(call.arguments) == ARGUMENTS
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    history = [*ASK, call.to_dict(), result]
    assert client.responses.create(model="x", input=history, tools=tools).output_text == ANSWER


def test_anthropic(address) -> None:
    client = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    with client.messages.stream(model="c", max_tokens=99, messages=ASK, tools=tools) as stream:
        for _ in stream:
            pass
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    assert call.type == "tool_use" and call.input == ARGUMENTS
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    said: Any = {"role": "assistant", "content": first.content}
    history = [*ASK, said, {"role": "user", "content": [result]}]
    second = client.messages.create(model="c", max_tokens=99, messages=history, tools=tools)
    assert second.content[0].text == ANSWER  # type: ignore[union-attr]
    with client.messages.stream(model="c", max_tokens=99, messages=ASK) as stream:
        assert "".join(stream.text_stream) == ANSWER


def test_llm(address, tmp_path) -> None:
    models = [{"model_id": "mine", "model_name": "tiny", "api_base": f"{address}/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    for option in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "mine", *option, "Hello"]
        run = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert run.stdout.strip() == ANSWER, run.stderr


def test_langchain(address) -> None:
    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return "rain"

    chat: Any = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="x")
    assert chat.invoke("Hello").content == ANSWER
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == ANSWER
    bound = chat.bind_tools([weather])
    answer = bound.invoke("Hello")
    assert answer.tool_calls[0]["args"] == ARGUMENTS
    streamed = None
    for chunk in bound.stream("Hello"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"] == ARGUMENTS
    history = [("user", "Hello"), answer, weather.invoke(answer.tool_calls[0])]
    assert bound.invoke(history).content == ANSWER


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]


def test_structured_output(tmp_path) -> None:
    # A target of chance would write spaces for ever, which JSON allows.
    with served(*write_tool_pair(tmp_path, answer='{"city": "Rome"}')) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.parse(model="x", messages=ASK, response_format=Place)
        assert answer.choices[0].message.parsed == Place(city="Rome")
        read = client.responses.parse(model="x", input=ASK, text_format=Place)
        assert read.output_parsed == Place(city="Rome")
        chat: Any = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="x")
        bound = chat.with_structured_output(Place, method="json_schema")
        assert bound.invoke("Hello") == Place(city="Rome")
        regex = {"guided_regex": "[A-C]{3}"}
        matched = client.chat.completions.create(model="x", messages=ASK, extra_body=regex)
        assert re.fullmatch("[A-C]{3}", matched.choices[0].message.content)
        grammar = {"guided_grammar": 'start: "yes" | "no"'}
        derived = client.completions.create(model="x", prompt="~", extra_body=grammar)
        assert derived.choices[0].text in ("yes", "no")
        for wrong in ({"guided_regex": "("}, {"guided_grammar": "start"}, {**regex, **grammar}):
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="x", messages=ASK, extra_body=wrong)
        both: Any = {"messages": ASK, "tools": [WEATHER], "extra_body": regex}
        with pytest.raises(openai.BadRequestError, match="leave one out"):
            client.chat.completions.create(model="x", **both)
