"""Text over HTTP is the text of `stream_generate`, whatever else the server does meanwhile."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import mlx.core as mx
import pytest

from dflash_mlx import load, make_sampler, stream_generate
from dflash_mlx.conversation import Template
from dflash_mlx.demo import demo_paths
from dflash_mlx.server.engine import Engine
from dflash_mlx.server.job import Sampling
from dflash_mlx.server.prompts import Prompts
from dflash_mlx.server.service import Defaults, Service
from tests.serving import events, post, serving

CHAT = "/v1/chat/completions"
TALK = ["Hello, I am Zokkim from Tunremisk.", "Please give me 14 green candles."]
QUESTIONS = [*TALK, "What is 12 plus 30?", "Please write the function add in Python."]
LIMIT = 60


@pytest.fixture(scope="module")
def pair() -> Any:
    return load(*demo_paths())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(Defaults(Sampling(), LIMIT, 7)) as address:
        yield address


@contextmanager
def served(defaults: Defaults) -> Iterator[str]:
    engine = Engine(lambda: load(*demo_paths()), cache_bytes=10**8)
    engine.start()
    prompts = Prompts(Template(engine.tokenizer))
    try:
        service = Service(engine, prompts, model="demo", draft="demo", defaults=defaults)
        with serving(service) as address:
            yield address
    finally:
        engine.close()


def alone(pair: Any, messages: list[Any], **sampling: Any) -> str:
    """What a call in this process answers."""
    model, tokenizer = pair
    prompt = Template(tokenizer).render(messages)
    options: Any = {"sampler": make_sampler(**sampling)} if sampling else {}
    responses = stream_generate(model, tokenizer, prompt, LIMIT, verify_length=7, **options)
    return "".join(response.text for response in responses)


def over_http(address: str, messages: list[Any], **fields: Any) -> str:
    answer = post(address, CHAT, {"messages": messages, **fields}).json()
    return answer["choices"][0]["message"]["content"]


def asked(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def test_cold_and_again(pair, address) -> None:
    for question in QUESTIONS:
        expected = alone(pair, asked(question))
        assert over_http(address, asked(question)) == expected
        assert over_http(address, asked(question)) == expected
        chunks = events(post(address, CHAT, {"messages": asked(question), "stream": True}))
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(deltas) == expected


def test_trees(pair) -> None:
    with served(Defaults(Sampling(), LIMIT, 7, tree=16)) as address:
        for question in QUESTIONS[:2]:
            answer = post(address, CHAT, {"messages": asked(question)}).json()
            assert answer["choices"][0]["message"]["content"] == alone(pair, asked(question))
            assert answer["x_dflash"]["verify_length"] > 14


def test_turn_after_turn(pair, address) -> None:
    messages: list[Any] = []
    for question in TALK:
        messages += asked(question)
        answer = over_http(address, messages)
        assert answer == alone(pair, messages)
        messages.append({"role": "assistant", "content": answer})


def test_with_neighbours_that_leave_and_fail(pair, address) -> None:
    def leave() -> None:
        body = {"messages": asked(TALK[0]), "stream": True, "temperature": 2.0}
        with httpx.stream("POST", address + CHAT, json=body) as answer:
            for line in answer.iter_lines():
                if '"content": "' in line:
                    return

    def fail() -> None:
        assert post(address, CHAT, {"messages": []}).status_code == 400
        beyond = {"prompt": [10**6], "max_tokens": 4}
        assert post(address, "/v1/completions", beyond).status_code == 400
        # One that breaks in the middle of its answer: the grammar grows too large with its text.
        words = " | ".join(f'"{i * "x"}"' for i in range(1, 3000))
        grammar = f"start: word+\nword: {words}"
        broken = post(address, CHAT, {"messages": asked(TALK[0]), "guided_grammar": grammar})
        assert broken.status_code == 500, broken.text

    expected = {question: alone(pair, asked(question)) for question in QUESTIONS}
    with ThreadPoolExecutor(12) as pool:
        neighbours = [pool.submit(action) for action in (leave, fail) * 6]
        asking = {
            pool.submit(over_http, address, asked(question)): question for question in QUESTIONS * 3
        }
        for answer, question in asking.items():
            assert answer.result() == expected[question]
        for neighbour in neighbours:
            neighbour.result()


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_say_where_their_tokens_stand(address, stream) -> None:
    body = {"prompt": "Hello", "max_tokens": 12, "logprobs": 0, "stream": stream}
    answer = post(address, "/v1/completions", body)
    chunks = events(answer) if stream else [answer.json()]
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["text"] for choice in choices)
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens = [token for one in told for token in one["tokens"]]
    places = [place for one in told for place in one["text_offset"]]
    assert places[0] == 0 and len(tokens) == 12
    # The first token's space is left out of a text, here as by mlx_lm.
    assert tokens[0] == f" {text[: places[1]]}"
    for token, place in zip(tokens[1:], places[1:], strict=True):
        assert text[place:].startswith(token)


def test_a_seed_repeats_sampled_text(pair, address) -> None:
    fields = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
    mx.random.seed(11)
    expected = alone(pair, asked(TALK[0]), temp=0.8, top_p=0.9)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: over_http(address, asked(TALK[0]), **fields), range(4)))
    assert answers == [expected] * 4
