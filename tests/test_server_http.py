"""What surrounds the APIs: errors, keys, pages of other sites, long waits, clients that leave."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.server import exchange
from dflash_mlx.server.protection import Protection
from tests.serving import events, post, saying, tool_tokenizer

HELLO: Any = [{"role": "user", "content": "Hello"}]
ASK: Any = {"messages": HELLO, "max_tokens": 50}
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TokenizerWrapper:
    return tool_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def quiet(tokenizer):
    with saying(tokenizer, "Fine.", positions=500) as (address, _):
        yield address


BAD: list[tuple[str, Any, str]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": "Hello"}, "messages must be a list"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text only"),
    (CHAT, {**ASK, "n": 2}, "n can only be 1"),
    (MESSAGES, {**ASK, "n": 2}, "n can only be 1"),
    (RESPONSES, {"input": "x", "n": 2}, "n can only be 1"),
    (CHAT, {**ASK, "max_tokens": "a"}, "max_tokens must be a whole number"),
    (CHAT, {**ASK, "seed": 10**4000}, "seed must be at least"),
    (CHAT, {**ASK, "chat_template_kwargs": {"chat_template": "x"}}, "cannot hold 'chat_template'"),
    (CHAT, {**ASK, "chat_template_kwargs": {"messages": []}}, "cannot hold 'messages'"),
    (MESSAGES, {**ASK, "guided_regex": "a", "guided_json": {}}, "Give only one"),
    (RESPONSES, {"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
    (CHAT, {**ASK, "temperature": "hot"}, "temperature must be a number"),
    (CHAT, {**ASK, "temperature": -1}, "temperature must be at least 0"),
    (CHAT, {**ASK, "top_p": 1.5}, "top_p must be at least 0 and at most 1"),
    (CHAT, {**ASK, "max_tokens": 0}, "max_tokens must be at least 1"),
    (CHAT, {**ASK, "stop": [1]}, "stop must be a string"),
    (CHAT, {**ASK, "top_logprobs": 3}, "top_logprobs needs logprobs"),
    (CHAT, {**ASK, "logit_bias": {"a": 1}}, "logit_bias must map"),
    (CHAT, {**ASK, "functions": [{}]}, "functions is not served; use tools."),
    (CHAT, {**ASK, "tools": [{"type": "function"}]}, "tools[0].type"),
    (CHAT, {**ASK, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {**ASK, "messages": [{"role": "user", "content": "x" * 600}]}, "too long"),
    (CHAT, [1], "must be a JSON object"),
    ("/v1/completions", {"prompt": ["a", "b"]}, "prompt must be one string"),
    ("/v1/completions", {"prompt": ""}, "empty"),
    ("/v1/completions", {"prompt": "a", "echo": True}, "echo is not served"),
    (MESSAGES, {"messages": HELLO}, "max_tokens is missing"),
    (MESSAGES, {"max_tokens": 5, "messages": []}, "messages is empty"),
    (MESSAGES, {**ASK, "tools": [{"type": "web_search_20250305"}]}, "tools[0].type"),
    (RESPONSES, {"input": []}, "input is empty"),
    (RESPONSES, {"input": [{"type": "item_reference"}]}, "does not know"),
    (RESPONSES, {"input": "x", "previous_response_id": "a"}, "previous_response_id"),
]


@pytest.mark.parametrize(("path", "body", "reason"), BAD)
def test_bad_requests_get_their_apis_error(quiet, path, body, reason) -> None:
    answer = post(quiet, path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert reason in error["message"]
    assert error["message"].count("\n") == 0 and "Traceback" not in answer.text
    assert (answer.json().get("type") == "error") == (path == MESSAGES)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"messages": NaN}', 400),
        (b"\xff\xfe", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 200),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "unknown": {"a": 1}}', 200),
    ],
)
def test_bodies_that_are_hardly_json(quiet, body, status) -> None:
    assert httpx.post(quiet + CHAT, content=body).status_code == status


def test_what_is_not_there(quiet) -> None:
    assert httpx.get(f"{quiet}/v1/nothing").json()["error"]["message"]
    assert httpx.get(quiet + CHAT).status_code == 405
    answer = httpx.get(f"{quiet}/v1/models").json()
    assert [model["id"] for model in answer["data"]] == ["tiny"]
    assert httpx.get(f"{quiet}/v1/models/any/name").json()["id"] == "tiny"


def test_large_bodies_are_not_read(tokenizer) -> None:
    with saying(tokenizer, "Fine.", Protection(most_bytes=1000)) as (address, _):
        long = [{"role": "user", "content": "x" * 2000}]
        assert post(address, MESSAGES, {**ASK, "messages": long}).status_code == 413

        def chunks():
            for _ in range(100):
                yield b" " * 100

        assert httpx.post(address + CHAT, content=chunks()).status_code == 413


def test_keys(tokenizer) -> None:
    with saying(tokenizer, "Fine.", Protection(keys=["secret", "other"])) as (address, _):
        for headers, status in [
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"x-api-key": "s\xe9cret".encode("latin-1")}, 401),
            ({"Authorization": "Bearer secret"}, 200),
            ({"x-api-key": "other"}, 200),
            ({"Authorization": "bearer other", "x-api-key": "none"}, 200),
            ({"Authorization": "Bearer none", "x-api-key": "secret"}, 200),
            ({"Authorization": "Bearer", "x-api-key": ""}, 401),
        ]:
            for path in (CHAT, MESSAGES):
                assert post(address, path, ASK, headers=headers).status_code == status
            assert httpx.get(f"{address}/metrics", headers=headers).status_code == status
        assert httpx.get(f"{address}/health").status_code == 200


def test_pages_of_other_sites_stay_outside(tokenizer) -> None:
    site = {"Origin": "https://evil.example"}
    with saying(tokenizer, "Fine.") as (address, _):
        assert post(address, CHAT, ASK, headers=site).status_code == 403
        assert post(address, CHAT, ASK, headers={"Host": "evil.example"}).status_code == 403
        assert post(address, CHAT, ASK, headers={"Host": "["}).status_code == 400
        for nowhere in ("http://[", "null", "127.0.0.1"):
            assert post(address, CHAT, ASK, headers={"Origin": nowhere}).status_code == 403
        assert post(address, CHAT, ASK, headers={"Origin": address}).status_code == 200
        assert "access-control-allow-origin" not in httpx.get(f"{address}/health").headers
    with saying(tokenizer, "Fine.", Protection(origins=["https://my.example"])) as (address, _):
        mine = {"Origin": "https://my.example"}
        answer = post(address, CHAT, ASK, headers=mine)
        assert answer.headers["access-control-allow-origin"] == "https://my.example"
        preflight = {**mine, "Access-Control-Request-Method": "POST"}
        assert httpx.options(address + CHAT, headers=preflight).status_code == 200
        assert post(address, CHAT, ASK, headers=site).status_code == 403


def test_a_grammar_is_compiled_while_others_are_served(tokenizer) -> None:
    with saying(tokenizer, "Fine.") as (address, engine):
        submit, go_on = engine.submit, threading.Event()

        def slowly(job: Any, listener: Any) -> Any:
            assert job.grammar is None or go_on.wait(10)
            return submit(job, listener)

        engine.submit = slowly
        with ThreadPoolExecutor(1) as pool:
            guided = pool.submit(post, address, CHAT, {**ASK, "guided_regex": "a"})
            assert post(address, CHAT, ASK).status_code == 200
            assert not guided.done()
            go_on.set()
            assert guided.result().status_code == 200


def test_a_full_queue_says_when_to_come_again(tokenizer) -> None:
    with saying(tokenizer, "Fine.", busy=True) as (address, _):
        for path in (CHAT, MESSAGES):
            answer = post(address, path, ASK)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "7"


def test_an_engine_that_ends_shows(tokenizer) -> None:
    with saying(tokenizer, "Fine.", alive=False) as (address, _):
        assert httpx.get(f"{address}/health").status_code == 503
        assert post(address, CHAT, ASK).status_code == 503
        assert "dflash_up 0" in httpx.get(f"{address}/metrics").text


def test_failures_in_the_middle_reach_the_client(tokenizer) -> None:
    with saying(tokenizer, "Fine.", fails="Out of memory.") as (address, _):
        answer = post(address, CHAT, ASK)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "Out of memory."
        last = events(post(address, CHAT, {**ASK, "stream": True}))[-1]
        assert last["error"]["message"] == "Out of memory."
        last = events(post(address, MESSAGES, {**ASK, "stream": True}))[-1]
        assert (last["type"], last["error"]["message"]) == ("error", "Out of memory.")
        last = events(post(address, RESPONSES, {"input": "x", "stream": True}))[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["message"] == "Out of memory."


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES, "/v1/completions"])
def test_long_waits_are_filled(tokenizer, path) -> None:
    body = {**ASK, ("input" if path == RESPONSES else "prompt"): "x"}
    with saying(tokenizer, "Fine.", pause=0.6, cycle=100) as (address, _):
        before = 0
        with httpx.stream("POST", address + path, json={**body, "stream": True}) as answer:
            for line in answer.iter_lines():
                if "Fine." in line:
                    break
                before += line.startswith("data: ")
        assert before >= 3
        whole = post(address, path, body)
        assert whole.status_code == 200
        assert whole.text.startswith(" ") and "Fine." in whole.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(tokenizer, stream) -> None:
    with saying(tokenizer, "Fine. " * 50, pause=0.05) as (address, engine):
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.stream(
                "POST", address + CHAT, json={**ASK, "stream": stream}, timeout=0.12
            ) as answer,
        ):
            for _ in answer.iter_bytes():
                time.sleep(0.01)
                if stream and engine.tickets:
                    raise httpx.ReadTimeout("enough")
        assert engine.last.wait(2)
        assert engine.tickets[-1].cancelled


def test_a_slow_reader_is_given_up(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(exchange, "MOST_WAITING", 50)
    with saying(tokenizer, "x" * 200_000, cycle=20) as (address, engine):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps({**ASK, "max_tokens": 200_000, "stream": True}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert engine_started(engine)
            assert engine.last.wait(10)
        assert engine.tickets[-1].cancelled
        assert post(address, CHAT, ASK).status_code == 200


def engine_started(engine: Any) -> bool:
    until = time.monotonic() + 5
    while not engine.tickets and time.monotonic() < until:
        time.sleep(0.01)
    return bool(engine.tickets)


def test_going_down_ends_streams_with_a_word(tokenizer) -> None:
    lines: list[str] = []

    def listen(address: str) -> None:
        with httpx.stream("POST", address + CHAT, json={**ASK, "stream": True}) as answer:
            lines.extend(answer.iter_lines())

    with saying(tokenizer, "Fine. " * 50, pause=0.1, cycle=1) as (address, engine):
        listener = threading.Thread(target=listen, args=(address,))
        listener.start()
        assert engine_started(engine)
        time.sleep(0.2)
    listener.join(5)
    assert not listener.is_alive()
    assert engine.tickets[-1].cancelled
    assert "going down" in lines[-2]


def test_metrics_are_prometheus_text(tokenizer) -> None:
    with saying(tokenizer, "Fine.") as (address, _):
        post(address, CHAT, ASK)
        post(address, CHAT, {})
        lines = httpx.get(f"{address}/metrics").text.splitlines()
    kinds = dict(line.split()[2:] for line in lines if line.startswith("# TYPE"))
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['dflash_http_requests_total{api="chat/completions"}'] == "1"
    assert values['dflash_http_refused_total{status="400"}'] == "1"
    assert values["dflash_acceptance_length"] == "3"
    assert {name.split("{")[0] for name in values} == kinds.keys()
    for name, kind in kinds.items():
        assert (kind == "counter") == name.endswith(("_total", "_sum", "_count")), name


def test_an_answer_that_cannot_be_read_fails_alone(tokenizer, monkeypatch, caplog) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("/a/path")

    with saying(tokenizer, "Fine.") as (address, _):
        with monkeypatch.context() as patch:
            patch.setattr(exchange.Channels, "feed", broken)
            for path in (CHAT, MESSAGES):
                answer = post(address, path, ASK)
                assert answer.status_code == 500 and "/a/path" not in answer.text
                last = events(post(address, path, {**ASK, "stream": True}))[-1]
                assert "its log says why" in last["error"]["message"]
        assert post(address, CHAT, ASK).status_code == 200
    assert "/a/path" in caplog.text
