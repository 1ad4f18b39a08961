"""The engine: what it emits is what `stream_generate` emits, whoever else is there."""

import queue
import threading
import time
from itertools import pairwise

import mlx.core as mx
import pytest

from dflash_mlx import load, stream_generate
from dflash_mlx.decode import Prefilled
from dflash_mlx.errors import DFlashError
from dflash_mlx.server.engine import Engine
from dflash_mlx.server.job import Busy, Failed, Finished, Job, Sampling, Started, Tokens, TooLong
from tests.engine_client import LIMIT, Client, answer
from tests.tiny_pair import write_pair

TOKENS = 40


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pair(paths):
    return load(*paths)


@pytest.fixture
def engine(paths):
    engine = Engine(lambda: load(*paths), cache_bytes=1 << 26, max_waiting=8)
    engine.start()
    yield engine
    engine.close()
    assert not engine.alive


def prompt(i: int) -> tuple[int, ...]:
    return tuple((7 * i + k * (i + 3)) % 90 + 6 for k in range(5 + 13 * i))


def expected(pair, i: int, tokens: int = TOKENS, **options) -> list[int]:
    model, tokenizer = pair
    return [r.token for r in stream_generate(model, tokenizer, list(prompt(i)), tokens, **options)]


def test_one_request(engine, pair):
    client = Client(engine, Job(prompt(1), TOKENS))
    event = client.end()
    assert client.ids == expected(pair, 1)
    assert isinstance(event, Finished)
    figures = event.figures
    assert figures.prompt_tokens == len(prompt(1)) and figures.cached == 0
    assert figures.generation_tokens == len(client.ids)
    assert figures.first_token_s > 0 and figures.generation_tps > 0 and figures.prompt_tps > 0


def test_several_at_once_and_more_in_the_queue(engine, pair):
    clients = [Client(engine, Job(prompt(i), TOKENS)) for i in range(7)]
    for i, client in enumerate(clients):
        assert isinstance(client.end(), Finished)
        assert client.ids == expected(pair, i), i


def test_turns_alternate(engine):
    order: list[int] = []

    def listener(i):
        return lambda event: order.append(i) if isinstance(event, Tokens) else None

    both = [engine.submit(Job(prompt(i), 30, verify_length=0), listener(i)) for i in (1, 2)]
    while engine.totals.finished < len(both):
        time.sleep(0.01)
    # From the second one's first cycle until the first one's last, they alternate.
    shared = order[order.index(2) : len(order) - order[::-1].index(1)]
    assert len(shared) > 20
    assert all(a != b for a, b in pairwise(shared))


def test_a_failure_ends_alone(engine, pair):
    steady = [Client(engine, Job(prompt(i), TOKENS)) for i in (1, 2)]
    bad = Client(engine, Job(prompt(3), TOKENS, verify_length=1000))
    assert isinstance(bad.end(), Failed)
    for i, client in zip((1, 2), steady, strict=True):
        assert isinstance(client.end(), Finished)
        assert client.ids == expected(pair, i)
    assert engine.alive and answer(engine, Job(prompt(4), TOKENS)) == expected(pair, 4)


def test_a_listener_that_raises_ends_its_own_request(engine, pair):
    def broken(event):
        if isinstance(event, Tokens):
            raise RuntimeError("gone")

    engine.submit(Job(prompt(2), TOKENS), broken)
    assert answer(engine, Job(prompt(1), TOKENS)) == expected(pair, 1)
    assert engine.totals.failed == 1 and engine.active == 0


def test_cancelling(engine, pair):
    gone = Client(engine, Job(prompt(2), -1))
    neighbour = Client(engine, Job(prompt(1), TOKENS))
    gone.wait_for(Tokens)
    gone.ticket.cancel()
    event = gone.end()
    assert isinstance(event, Finished) and event.reason == "cancelled"
    assert isinstance(neighbour.end(), Finished) and neighbour.ids == expected(pair, 1)
    # Whoever waits can leave the queue.
    running = [Client(engine, Job(prompt(i), -1)) for i in range(4)]
    waiting = Client(engine, Job(prompt(5), -1))
    waiting.ticket.cancel()
    event = waiting.end()
    assert isinstance(event, Finished) and event.reason == "cancelled" and not waiting.ids
    for client in running:
        client.ticket.cancel()
        client.end()


def test_the_only_one_leaves_the_queue_before_its_first_turn(engine, pair):
    left: queue.Queue[Client] = queue.Queue()

    def listener(event):  # called by the worker, which cannot take the next job meanwhile
        if isinstance(event, Finished):
            client = Client(engine, Job(prompt(2), TOKENS))
            client.ticket.cancel()
            left.put(client)

    engine.submit(Job(prompt(1), 1), listener)
    event = left.get(timeout=LIMIT).end()
    assert isinstance(event, Finished) and event.reason == "cancelled"
    assert answer(engine, Job(prompt(1), TOKENS)) == expected(pair, 1)


def test_cancelling_a_prefill_within_a_chunk(engine):
    chunks: list[Prefilled] = []
    begun, release = threading.Event(), threading.Event()
    ended = threading.Event()

    def listener(event):
        if isinstance(event, Prefilled):
            chunks.append(event)
            begun.set()
            release.wait(30)
        if isinstance(event, Finished):
            ended.set()

    ticket = engine.submit(Job(prompt(5) * 5, TOKENS), listener)
    begun.wait(30)
    ticket.cancel()
    release.set()
    assert ended.wait(30) and len(chunks) == 1


def test_stopping_in_the_listener_holds_at_once(engine, pair):
    done = threading.Event()
    seen: list[object] = []

    def listener(event):
        seen.append(event)
        if isinstance(event, Tokens) and sum(len(e.tokens) for e in tokens()) >= 9:
            ticket.stop(at=9)
        if isinstance(event, (Finished, Failed)):
            done.set()

    def tokens():
        return [e for e in seen if isinstance(e, Tokens)]

    ticket = engine.submit(Job(prompt(1), -1), listener)
    assert done.wait(30)
    last = seen[-1]
    assert isinstance(last, Finished) and last.reason == "stop"
    ids = [t.id for e in tokens() for t in e.tokens]
    assert ids[:9] == expected(pair, 1, 9) and len(ids) < 9 + 4


def test_a_top_k_beyond_the_vocabulary_leaves_out_nothing(engine):
    texts = [
        answer(engine, Job(prompt(2), TOKENS, sampling=Sampling(1.5, top_k=top_k, seed=3)))
        for top_k in (0, 10**6, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_log_probabilities(engine, pair):
    model, tokenizer = pair
    client = Client(engine, Job(prompt(1), 6, logprobs=True, top_logprobs=3, verify_length=2))
    told = []
    while not isinstance(event := client.events.get(timeout=60), Finished):
        told += list(event.tokens) if isinstance(event, Tokens) else []
    responses = list(stream_generate(model, tokenizer, list(prompt(1)), 6))
    for token, response in zip(told, responses, strict=True):
        assert token.logprob == pytest.approx(response.logprobs[token.id].item(), abs=1e-4)
        best = mx.argsort(-response.logprobs)[:3].tolist()
        assert [i for i, _ in token.top] == best


def test_too_long_and_unmeant(engine):
    with pytest.raises(TooLong, match="2048 positions"):
        engine.submit(Job((7,) * 2048), print)
    biased = Sampling(logit_bias=((10**6, 1.0),))
    for job in (Job(()), Job((7,), 0), Job((7,), -2), Job((10**6,)), Job((7,), sampling=biased)):
        with pytest.raises(DFlashError):
            engine.submit(job, print)


def test_answers_end_with_the_positions(engine):
    ids = answer(engine, Job((7, 9) * 1020, -1))
    assert 0 < len(ids) <= 8


def test_a_full_queue(engine):
    clients = [Client(engine, Job(prompt(5), -1)) for _ in range(4)]
    for client in clients:
        client.wait_for(Started)
    clients += [Client(engine, Job(prompt(5), -1)) for _ in range(8)]
    with pytest.raises(Busy) as busy:
        Client(engine, Job(prompt(5), -1))
    assert busy.value.retry_after >= 1 and engine.totals.refused == 1
    for client in clients:
        client.ticket.cancel()
    for client in clients:
        client.end()
    assert engine.waiting == engine.active == 0
    assert engine.totals.cancelled == engine.totals.submitted == len(clients)


def test_closing_ends_everybody(paths):
    engine = Engine(lambda: load(*paths), cache_bytes=1 << 26)
    engine.start()
    clients = [Client(engine, Job(prompt(3), -1)) for _ in range(6)]
    engine.close()
    for client in clients:
        event = client.end()
        assert isinstance(event, Finished) and event.reason == "cancelled"
    with pytest.raises(DFlashError, match="has ended"):
        Client(engine, Job(prompt(1)))


def test_what_loading_raises_comes_out(tmp_path):
    engine = Engine(lambda: load(tmp_path, tmp_path), cache_bytes=1 << 26)
    with pytest.raises(DFlashError):
        engine.start()
    assert not engine.alive
