"""bench, chat and serve over two ranks: rank 0 talks, and the others do the same."""

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from dflash_mlx import load, stream_generate
from dflash_mlx.conversation import Template
from dflash_mlx.demo import demo_paths
from dflash_mlx.server.job import Job, Sampling
from dflash_mlx.server.orders import from_text, to_text
from dflash_mlx.server.structured import Grammar
from tests.local_ranks import bench, chat, endless, finish, listen, said, serve, start

DEMO_TARGET, _ = demo_paths()
CHAT = "/v1/chat/completions"
READY = "Ctrl-C ends it. One line for every answer:\n"


def test_bench_counts_what_ranks_exchange(tmp_path: Path) -> None:
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    prompts.write_text('{"prompt": "Hello, I am Zokkim from Tunremisk."}', encoding="utf-8")
    command = bench("--prompts", str(prompts), "--json", str(report), "--max-tokens", "24")
    (code, stderr, screen), (other, silence, nothing) = finish(start(tmp_path, 2, command))
    assert (code, other) == (0, 0), stderr + silence
    assert (nothing, silence) == ("", "")
    summary = json.loads(report.read_text(encoding="utf-8"))["summary"]
    plain, drafted = summary["plain"], summary["dflash"]
    assert summary["identical"] and plain["tokens"] == 24
    # Two for each layer of the demo target: behind its attention, and behind its MLP.
    per_forward = 2 * json.loads((DEMO_TARGET / "config.json").read_text())["num_hidden_layers"]
    assert plain["collectives"] * 24 == per_forward * 25  # mlx_lm is one step ahead
    forwards = 1 + sum(summary["histogram"])
    own = drafted["collectives"] * 24 - per_forward * forwards
    assert forwards <= own <= 5 * forwards
    assert f"exchange numbers {plain['collectives']:.1f} times" in " ".join(screen.split())


def test_chat_follows_rank_0(tmp_path: Path) -> None:
    saved, lines = tmp_path / "talk.json", "Hello, I am Zokkim from Tunremisk.\n/set max_tokens 9\n"
    lines += f'/system ""\nPlease give me\n"""\nPlease give me\n"""\n/save {saved}\n/reset\n'
    lines += f"/load {saved}\n/load {tmp_path}/nothing\nGood bye.\n/quit\n"
    alone = subprocess.run(chat(), input=lines, capture_output=True, text=True, check=True)
    ranks = start(tmp_path, 2, chat(), subprocess.PIPE)
    assert ranks[0].stdin is not None
    ranks[0].stdin.write(lines)
    ranks[0].stdin.flush()
    (code, stderr, text), (other, silence, nothing) = finish(ranks)
    assert (code, other) == (0, 0), stderr + silence
    assert text == alone.stdout and len(text) > 100
    assert "Loaded 6 messages" in stderr and "There is no file" in stderr
    assert "cached" in stderr
    assert (nothing, silence) == ("", "")


def test_ctrl_c_stops_an_answer_of_a_chat(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    ranks = start(tmp_path, 2, chat("--temp", "50", "--max-tokens", "100000"), theirs)
    assert ranks[0].stdout is not None
    os.write(ours, b"zzz qqq\n")
    ranks[0].stdout.read(20)
    ranks[0].send_signal(signal.SIGINT)
    os.write(ours, b"/set temp 0\n/reset\nHello, I am Zokkim from Tunremisk.\n/quit\n")
    (code, stderr, text), (other, silence, _) = finish(ranks)
    assert (code, other) == (0, 0), stderr + silence
    assert "Stopped." in stderr
    assert text.splitlines()[-1].startswith("Hello Zokkim, welcome to the shop.")
    assert silence == ""
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "bench"])
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_the_other(tmp_path: Path, dies: int, command: str) -> None:
    commands = {"generate": endless(), "chat": chat(), "serve": serve(), "bench": bench()}
    ranks = start(tmp_path, 2, commands[command], subprocess.PIPE)
    waits = {"chat": "\n> ", "serve": "Ctrl-C ends it. One line for every answer:\n"}
    if command in waits:
        listen(ranks[0], waits[command])
    else:
        assert ranks[0].stdout is not None
        ranks[0].stdout.read(20)
    ranks[dies].kill()
    begin = time.monotonic()
    code, stderr, _ = finish(ranks)[1 - dies]
    assert time.monotonic() - begin < 20
    assert code == 1
    (sentence,) = said(stderr)
    assert "Another rank has ended" in sentence
    assert "Traceback" not in stderr


def test_serve_answers_as_one_process(tmp_path: Path) -> None:
    model, tokenizer = load(*demo_paths())
    hello, candles = "Hello, I am Zokkim from Tunremisk.", "Please give me 14 green candles."

    def ask(question: str, **fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}], "max_tokens": 24, **fields}

    def expected(question: str) -> str:
        prompt = Template(tokenizer).render(ask(question)["messages"])
        responses = stream_generate(model, tokenizer, prompt, 24, verify_length=15)
        return "".join(response.text for response in responses)

    ranks = start(tmp_path, 2, serve())
    address = next(w for w in listen(ranks[0], READY).split() if w.startswith("http://"))

    def answer(body: dict[str, Any]) -> str:
        reply = httpx.post(address + CHAT, json=body, timeout=120).json()
        return reply["choices"][0]["message"]["content"]

    try:
        assert answer(ask(hello)) == expected(hello)
        # Several at once take turns; rank 0 alone knows when one leaves.
        bias = {str(token): -100 for token in tokenizer.eos_token_ids}
        endless = ask("zzz", max_tokens=3000, logit_bias=bias, stream=True)
        with httpx.stream("POST", address + CHAT, json=endless, timeout=60) as response:
            next(response.iter_lines())
            with ThreadPoolExecutor(2) as pool:
                assert list(pool.map(answer, [ask(hello), ask(candles)])) == [
                    expected(hello),
                    expected(candles),
                ]
        stopped = answer(ask(candles, stop=[expected(candles)[10:14]]))
        assert stopped == expected(candles)[:10]
        drawn = [answer(ask("zzz", temperature=2, seed=7)) for _ in range(2)]
        assert drawn[0] == drawn[1]
        assert answer(ask("zzz", temperature=2))
        form = {"type": "json_object"}
        assert answer(ask("zzz", response_format=form)).lstrip().startswith("{")
        assert answer(ask(hello, logprobs=True, top_logprobs=2)) == expected(hello)
        counts = httpx.get(address + "/metrics").text
    finally:
        ranks[0].send_signal(signal.SIGINT)
        (code, stderr, _), (other, silence, nothing) = finish(ranks)
    assert (code, other) == (0, 0), stderr + silence
    assert "Stopped." in stderr
    assert (nothing, silence) == ("", "")
    assert "dflash_cancelled_total 1\n" in counts


def test_a_request_reaches_other_ranks_whole() -> None:
    sampling = Sampling(
        temperature=0.7, top_p=0.9, xtc_special_tokens=(1, 2), seed=2**63, logit_bias=((5, -1.5),)
    )
    grammar = Grammar("regex", "a+", ((1, 2), (3,)))
    for job in (
        Job((1, 2, 3)),
        Job(
            (1,),
            7,
            (1, 2),
            own=3,
            sampling=sampling,
            stop_tokens=frozenset({4, 9}),
            verify_length=None,
            grammar=grammar,
            logprobs=True,
            top_logprobs=3,
        ),
    ):
        assert from_text(to_text(job)) == job
