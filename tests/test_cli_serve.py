"""`dflash-mlx serve` as people start and end it, with the demo pair."""

import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from dflash_mlx import load, stream_generate
from dflash_mlx.demo import demo_paths
from tests.command_line import complaint, run, spawn

QUESTION = "Hello, I am Zokkim from Tunremisk."


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server process and its address; it is interrupted at the end, if it still runs."""
    process = spawn(
        ["serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        screen = ""
        while "Ctrl-C" not in screen:
            line = process.stderr.readline()
            assert line, screen
            screen += line
        yield re.findall(r"http://[\w.:]+", screen)[0], process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def test_it_answers_and_ends_by_an_interrupt() -> None:
    with served() as (address, process):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        answer = client.chat.completions.create(
            model="gpt-4", messages=[{"role": "user", "content": QUESTION}]
        )
        assert httpx.get(f"{address}/%1b[31m").status_code == 404
        process.send_signal(signal.SIGINT)
        out, log = process.communicate(timeout=20)
    model, tokenizer = load(*demo_paths())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    text = "".join(r.text for r in stream_generate(model, tokenizer, prompt, 200))
    assert answer.choices[0].message.content == text
    assert process.returncode == 0
    assert out == ""
    line = next(line for line in log.splitlines() if "chat/completions" in line)
    assert re.search(r"\d+ tokens, 0/\d+ cached, first token [\d.]+ s, \d+ tokens/s, acc", line)
    assert "asked for 'gpt-4'" in line
    assert "/\\x1b[31m: 404" in log and "\x1b" not in log
    assert log.splitlines()[-1] == "Stopped."


def test_an_interrupt_ends_what_is_being_written() -> None:
    with served() as (address, process):
        body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
        body["logit_bias"] = {"0": -100, "1": -100, "2": -100, "3": -100}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if "content" in line)
            process.send_signal(signal.SIGINT)
            said = list(lines)
        assert "going down" in said[-2] or "[DONE]" in said[-2]
        assert process.wait(20) == 0


def test_others_are_let_in_with_a_key_only(tmp_path) -> None:
    said = complaint(run("serve", "--host", "0.0.0.0"), 2)
    assert "--api-key" in said and "--no-auth" in said
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    with served("--host", "0.0.0.0", "--api-key-file", str(keys)) as (address, _):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        key = {"Authorization": "Bearer two"}
        assert httpx.get(f"{address}/v1/models", headers=key).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--api-key-file", "missing"], 1, "There is no key file missing."),
        (["--api-key-file", "empty"], 1, "has no key"),
        (["--api-key", ""], 1, "A key cannot be empty"),
        (["-m", "missing"], 1, "missing"),
        (["--host", "no.such.host.invalid"], 2, "others can reach"),
        (["--host", "no.such.host.invalid", "--no-auth"], 1, "There is no host"),
        (["--cache-bytes", "much"], 2, "no number of bytes"),
    ],
)
def test_a_start_that_fails_says_why(tmp_path, monkeypatch, arguments, code, reason) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    assert reason in complaint(run("serve", "--port", "0", *arguments), code)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert "something else listens there" in complaint(run("serve", "--port", port), 1)
