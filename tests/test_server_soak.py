"""A thousand requests of every kind, and nothing is left of them."""

import gc
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serving import post
from tests.test_server_clients import ASK, WEATHER, served
from tests.tool_pair import write_tool_pair

# Seconds without a byte that are a stall, on a busy machine, too.
PATIENCE = 60
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


def short(address: str, rng: random.Random) -> None:
    body = {"messages": ASK, "max_tokens": 12, "temperature": rng.choice([0, 1.0])}
    tools = {"tools": [WEATHER]} if rng.random() < 0.5 else {}
    assert post(address, CHAT, {**body, **tools}, timeout=PATIENCE).status_code == 200


def long(address: str, rng: random.Random) -> None:
    text = " ".join(rng.choices(["One", "two", "three"], k=rng.randint(50, 400)))
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 30}
    assert post(address, MESSAGES, body, timeout=PATIENCE).status_code == 200


def cancelled(address: str, rng: random.Random) -> None:
    body = {"messages": ASK, "stream": True, "max_tokens": 2000, "temperature": 3.0}
    with httpx.stream("POST", address + CHAT, json=body, timeout=PATIENCE) as answer:
        for _, _ in zip(answer.iter_lines(), range(rng.randint(0, 6)), strict=False):
            pass


def malformed(address: str, rng: random.Random) -> None:
    bodies: list[Any] = [b"{", b"[]", b'{"messages": 3}', b'{"messages": [], "n": 2}', b"\xff"]
    path = rng.choice([CHAT, MESSAGES, "/v1/responses", "/v1/completions"])
    content = rng.choice(bodies)
    assert httpx.post(address + path, content=content, timeout=PATIENCE).status_code == 400


def slow(address: str, rng: random.Random) -> None:
    """A client that reads a little, waits, and leaves without a word."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"messages": ASK, "stream": True, "max_tokens": 300}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.sendall(head.encode() + body)
        client.recv(64)
        time.sleep(rng.random() / 20)


def memory() -> int:
    """Bytes that this process has resident."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled(address: str) -> None:
    """Wait until nothing is being answered."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        text = httpx.get(f"{address}/metrics").text
        if "dflash_active 0\n" in text and "dflash_waiting 0\n" in text:
            return
        time.sleep(0.05)
    raise AssertionError("Something is still being answered.")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="it counts as Linux does")
def test_a_thousand_requests_leave_nothing(tmp_path) -> None:
    with served(*write_tool_pair(tmp_path)) as address:

        def ask(number: int) -> None:
            rng = random.Random(number)
            rng.choice([short, short, long, cancelled, malformed, slow])(address, rng)

        def run(numbers: range) -> tuple[int, int, int]:
            with ThreadPoolExecutor(8) as clients:
                for done in [clients.submit(ask, number) for number in numbers]:
                    done.result()
            settled(address)
            gc.collect()
            return memory(), len(os.listdir("/proc/self/fd")), threading.active_count()

        before = run(range(300))
        after = run(range(300, 1300))
        assert httpx.get(f"{address}/health").status_code == 200
        assert "dflash_failed_total 0\n" in httpx.get(f"{address}/metrics").text
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 1
    # The prefix cache fills up to its bound meanwhile, which `served` sets to 100 MB.
    assert after[0] - before[0] < 150e6
