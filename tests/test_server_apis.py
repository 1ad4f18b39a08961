"""The APIs over loopback, as their own clients see them; an engine that recites stands behind."""

import json
from typing import Any

import anthropic
import openai
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.serving import events, post, saying, tool_tokenizer

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TokenizerWrapper:
    return tool_tokenizer(tmp_path_factory.mktemp("tokenizer"))


THOUGHT = "<think>Let me see.</think>\n\nIt is Oslo."


def test_chat_whole_and_streamed(tokenizer) -> None:
    with saying(tokenizer, THOUGHT) as (address, engine):
        body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
        answer = post(address, "/v1/chat/completions", body).json()
        ChatCompletion.model_validate(answer, strict=True)
        message = answer["choices"][0]["message"]
        assert message["content"] == "It is Oslo."
        assert message["reasoning_content"] == "Let me see."
        shown = answer["choices"][0]["logprobs"]["content"]
        assert "".join(token["token"] for token in shown) == "It is Oslo."
        assert all(len(token["top_logprobs"]) == 2 for token in shown)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert answer["x_dflash"]["acceptance_length"] == 3.0

        options = {"include_usage": True}
        stream = post(
            address,
            "/v1/chat/completions",
            {**body, "stream": True, "stream_options": options, "x_dflash": {"spans": True}},
        )
        assert stream.text.endswith("data: [DONE]\n\n")
        chunks = events(stream)
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == answer["usage"]
        deltas = [c["choices"][0]["delta"] for c in chunks[:-1]]
        assert "".join(d.get("content", "") for d in deltas) == "It is Oslo."
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "Let me see."
        spans = [s for c in chunks[:-2] for s in c.get("x_dflash", {}).get("spans", [])]
        assert sum(length for length, _ in spans) == len("It is Oslo.")
        assert {drafted for _, drafted in spans} == {True, False}
        job = engine.jobs[-1]
        assert job.boundaries and job.boundaries[-1] < len(job.prompt)


@pytest.mark.parametrize("cycle", [1, 4, 100])
def test_tool_calls_streamed_and_whole_are_the_same(tokenizer, cycle) -> None:
    text = f"<think>Hm.</think>\n\nI look.\n{CALL}\n{CALL.replace('Oslo', 'Rome')}"
    with saying(tokenizer, text, cycle=cycle) as (address, _):
        body = {"messages": HELLO, "tools": [WEATHER]}
        choice = post(address, "/v1/chat/completions", body).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "I look."
        calls = [call["function"] for call in choice["message"]["tool_calls"]]
        assert [json.loads(c["arguments"])["city"] for c in calls] == ["Oslo", "Rome"]
        chunks = events(post(address, "/v1/chat/completions", {**body, "stream": True}))
        deltas = [c["choices"][0]["delta"] for c in chunks]
        streamed = [call for d in deltas for call in d.get("tool_calls", [])]
        assert [call["function"] for call in streamed] == calls
        assert [call["index"] for call in streamed] == [0, 1]
        assert len({call["id"] for call in streamed}) == 2
        assert "".join(d.get("content", "") for d in deltas) == "I look."
        # One call only, where that is asked for; and none where no tools are.
        one = {**body, "parallel_tool_calls": False}
        choice = post(address, "/v1/chat/completions", one).json()["choices"][0]
        assert len(choice["message"]["tool_calls"]) == 1
        none = {**body, "tool_choice": "none"}
        choice = post(address, "/v1/chat/completions", none).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == text.split("</think>\n\n")[1]


def test_tool_choice_begins_the_answer_with_the_call(tokenizer) -> None:
    rest = '", "arguments": {"city": "Oslo"}}</tool_call> and more'
    with saying(tokenizer, rest) as (address, engine):
        named = {"type": "function", "function": {"name": "weather"}}
        body = {"messages": HELLO, "tools": [WEATHER], "tool_choice": named}
        answer = post(address, "/v1/chat/completions", body).json()
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
        assert answer["choices"][0]["message"]["content"] is None
        assert tokenizer.decode(engine.jobs[-1].prompt).endswith('<tool_call>{"name": "weather')
        wrong = {**body, "tool_choice": {"type": "function", "function": {"name": "x"}}}
        assert post(address, "/v1/chat/completions", wrong).status_code == 400
    with saying(tokenizer, CALL.removeprefix("<tool_call>")) as (address, engine):
        answer = post(address, "/v1/chat/completions", {**body, "tool_choice": "required"}).json()
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        tools = [{"name": "weather", "input_schema": {"type": "object"}}]
        any_tool = {"max_tokens": 200, "messages": HELLO, "tools": tools}
        any_tool["tool_choice"] = {"type": "any"}
        answer = post(address, "/v1/messages", any_tool).json()
        assert answer["stop_reason"] == "tool_use"
        assert answer["content"][0]["input"] == {"city": "Oslo"}


def test_malformed_calls_are_text(tokenizer, caplog) -> None:
    broken = '<tool_call>{"name": "weather", </tool_call> Sorry.'
    with saying(tokenizer, broken) as (address, _):
        body = {"messages": HELLO, "tools": [WEATHER]}
        for stream in (False, True):
            answer = post(address, "/v1/chat/completions", {**body, "stream": stream})
            if stream:
                deltas = [c["choices"][0]["delta"] for c in events(answer)]
                text = "".join(d.get("content", "") for d in deltas)
            else:
                assert answer.json()["choices"][0]["finish_reason"] == "stop"
                text = answer.json()["choices"][0]["message"]["content"]
            assert text == broken
    assert "malformed" in caplog.text


def test_stop_strings_cut_text_and_figures(tokenizer) -> None:
    with saying(tokenizer, "<think>is</think>It is Oslo.") as (address, engine):
        body = {"messages": HELLO, "stop": ["is O", "never"]}
        answer = post(address, "/v1/chat/completions", body).json()
        assert answer["choices"][0]["message"]["content"] == "It "
        assert answer["choices"][0]["finish_reason"] == "stop"
        before = len(tokenizer.encode("<think>is</think>It is O"))
        assert answer["usage"]["completion_tokens"] == before
        assert engine.tickets[-1].stop_at == before
        body = {"messages": HELLO, "max_tokens": 99, "stop_sequences": ["Oslo"]}
        answer = post(address, "/v1/messages", body).json()
        assert answer["stop_reason"] == "stop_sequence"
        assert answer["stop_sequence"] == "Oslo"
        assert answer["content"][-1]["text"] == "It is "
        answer = post(address, "/v1/completions", {"prompt": "x", "stop": "Oslo"}).json()
        Completion.model_validate(answer, strict=True)
        assert answer["choices"][0]["text"] == "<think>is</think>It is "


def test_plain_completions(tokenizer) -> None:
    with saying(tokenizer, " One two three") as (address, engine):
        body = {"prompt": [10, 11, 12], "max_tokens": 2, "logprobs": 1}
        answer = post(address, "/v1/completions", body).json()
        Completion.model_validate(answer, strict=True)
        assert engine.jobs[-1].prompt == (10, 11, 12)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == 2
        chunks = events(post(address, "/v1/completions", {"prompt": "x", "stream": True}))
        Completion.model_validate(chunks[-1], strict=True)
        assert "".join(c["choices"][0]["text"] for c in chunks) == " One two three"


def test_messages(tokenizer) -> None:
    text = f"<think>Hm.</think>\n\nI look.{CALL}"
    tools: Any = [{"name": "weather", "input_schema": WEATHER["function"]["parameters"]}]
    with saying(tokenizer, text) as (address, engine):
        client = anthropic.Anthropic(base_url=address, api_key="any", max_retries=0)
        system: Any = [
            {"type": "text", "text": "x-anthropic-billing-header: cch=123;"},
            {"type": "text", "text": "x-anthropic-billing-header: cch=4;\nBe brief."},
        ]
        whole = client.messages.create(
            model="claude", max_tokens=500, messages=HELLO, tools=tools, system=system
        )
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
        assert whole.stop_reason == "tool_use"
        assert whole.usage.cache_read_input_tokens
        prompt = tokenizer.decode(engine.jobs[-1].prompt)
        assert "Be brief." in prompt and "billing" not in prompt
        with client.messages.stream(
            model="claude", max_tokens=500, messages=HELLO, tools=tools
        ) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
        assert [_without_id(block) for block in streamed.content] == [
            _without_id(block) for block in whole.content
        ]
        assert streamed.usage.output_tokens == whole.usage.output_tokens
        # The next turn: the call and its result go back into the prompt.
        results: Any = [
            {"type": "tool_result", "tool_use_id": whole.content[2].id, "content": "Rain."}
        ]
        answer: Any = {"role": "assistant", "content": whole.content}
        history = [*HELLO, answer, {"role": "user", "content": results}]
        client.messages.create(model="c", max_tokens=9, messages=history, tools=tools)
        prompt = tokenizer.decode(engine.jobs[-1].prompt)
        assert f"I look.{CALL}<|end|>" in prompt and "tool\nRain." in prompt
        counted = client.messages.count_tokens(model="c", messages=history, tools=tools)
        assert counted.input_tokens == len(engine.jobs[-1].prompt)
        with pytest.raises(anthropic.BadRequestError, match="max_tokens is missing"):
            client.post("/v1/messages", cast_to=object, body={"messages": HELLO})


def _without_id(block: Any) -> dict[str, Any]:
    return {k: v for k, v in block.to_dict().items() if k != "id"}


def test_an_answer_can_be_begun_over_messages(tokenizer) -> None:
    with saying(tokenizer, " it is.") as (address, engine):
        begun = [*HELLO, {"role": "assistant", "content": "Yes,"}]
        post(address, "/v1/messages", {"max_tokens": 9, "messages": begun})
        assert tokenizer.decode(engine.jobs[-1].prompt).endswith("assistant\nYes,")


def test_responses(tokenizer) -> None:
    text = f"<think>Hm.</think>\n\nI look.{CALL}"
    tools: Any = [{"type": "function", **WEATHER["function"]}, {"type": "web_search"}]
    with saying(tokenizer, text) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        whole = client.responses.create(model="x", input="Hello", tools=tools)
        assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
        assert whole.output_text == "I look." and whole.status == "completed"
        assert whole.usage and whole.usage.output_tokens_details.reasoning_tokens > 0
        body = {"input": "Hello", "tools": tools, "stream": True}
        adapter: Any = TypeAdapter(ResponseStreamEvent)
        raw = events(post(address, "/v1/responses", body))
        for event in raw:
            adapter.validate_python(event, strict=True)
        assert [e["sequence_number"] for e in raw] == list(range(len(raw)))
        with client.responses.stream(model="x", input="Hello", tools=tools[:1]) as stream:
            for _ in stream:
                pass
            final = stream.get_final_response()
        assert final.output_text == "I look."
        assert final.output[2].arguments == whole.output[2].arguments  # type: ignore[union-attr]
        # The next turn, as an agent sends it: all items come back.
        call: Any = whole.output[2]
        items: Any = [
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            *[item.to_dict() for item in whole.output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."},
        ]
        client.responses.create(model="x", input=items, instructions="Be brief.", tools=tools)
        prompt = tokenizer.decode(engine.jobs[-1].prompt)
        assert prompt.startswith("<|start|>system\nBe brief.")
        assert f"I look.{CALL}<|end|>" in prompt and "tool\nRain." in prompt
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(model="x", input="x", previous_response_id="resp_1")
        short = client.responses.create(model="x", input="Hello", max_output_tokens=8)
        assert short.status == "incomplete"


def test_custom_tools_of_responses(tokenizer) -> None:
    call = '<tool_call>{"name": "patch", "arguments": {"input": "+ a"}}</tool_call>'
    tools: Any = [{"type": "custom", "name": "patch", "description": "Patches."}]
    with saying(tokenizer, call) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        answer = client.responses.create(model="x", input="Hello", tools=tools)
        assert answer.output[0].type == "custom_tool_call"
        assert answer.output[0].input == "+ a"
        body = {"input": "Hello", "tools": tools, "stream": True}
        adapter: Any = TypeAdapter(ResponseStreamEvent)
        for event in events(post(address, "/v1/responses", body)):
            adapter.validate_python(event, strict=True)
        item = answer.output[0].to_dict()
        output = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "ok"}
        client.responses.create(model="x", input=[item, output], tools=tools)  # type: ignore[list-item]
        assert call in tokenizer.decode(engine.jobs[-1].prompt)
