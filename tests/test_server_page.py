"""The page at /, in a real browser."""

import json
from typing import Any

import httpx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.server.protection import Protection
from tests.chromium import PROGRAM, Page, browsing
from tests.serving import saying, tool_tokenizer

browser_only = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TokenizerWrapper:
    return tool_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_the_page_is_one_file_that_asks_nobody_else(tokenizer) -> None:
    with saying(tokenizer, "Fine.", Protection(keys=["k"])) as (address, _):
        answer = httpx.get(f"{address}/")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in answer.text


def say(tab: Page, text: str) -> None:
    tab.run("document.getElementById('question').focus()")
    tab.type(text)
    tab.press("Enter")


def text(tab: Page, selector: str) -> Any:
    return tab.run(f"document.querySelector({json.dumps(selector)})?.textContent")


@pytest.mark.slow
@browser_only
def test_a_talk(tab: Page, tokenizer) -> None:
    reply = "<think>Hm.</think>\n\n# Head\n- a **b** `c`\n\n```\n<b>x</b>\n```\nend"
    with saying(tokenizer, reply) as (address, engine):
        tab.look(1100, 760)
        tab.open(address)
        tab.wait("document.getElementById('model').textContent === 'tiny'")
        tab.run("document.getElementById('system').value = 'Be brief.'")
        tab.run("document.getElementById('temperature').value = '0.5'")
        say(tab, "Hello")
        tab.wait("document.querySelector('.figures button')")
        assert text(tab, ".thought div") == "Hm."
        assert tab.run("document.querySelector('.thought').open") is False
        assert text(tab, ".text h2") == "Head"
        assert text(tab, ".text li") == "a b c"
        assert text(tab, ".text pre") == "<b>x</b>\n"
        assert text(tab, ".text p") == "end"
        assert "acceptance length" in text(tab, ".figures")
        job = engine.jobs[-1]
        assert "Be brief." in tokenizer.decode(job.prompt)
        assert job.sampling.temperature == 0.5
        # What the draft wrote is marked, and shows when the switch is on.
        drafted = tab.run("[...document.querySelectorAll('.d')].map(n => n.textContent).join('')")
        assert 0 < len(drafted) < len(reply)
        wash = "getComputedStyle(document.querySelector('.text .d')).backgroundColor"
        before = tab.run(wash)
        tab.press("d", "KeyD", alt=True)
        assert tab.run(wash) != before
        say(tab, "Again")
        tab.wait("document.querySelectorAll('.figures button').length === 4")
        prompt = tokenizer.decode(engine.jobs[-1].prompt)
        assert "Hello" in prompt and "# Head" in prompt and "Again" in prompt
        # On a phone nothing is cut off, in dark colours either.
        tab.look(360, 700, dark=True)
        assert tab.run("document.documentElement.scrollWidth") == 360
        dark = tab.run("getComputedStyle(document.body).backgroundColor")
        tab.look(360, 700)
        assert tab.run("getComputedStyle(document.body).backgroundColor") != dark
        assert tab.complaints == []


@pytest.mark.slow
@browser_only
def test_stopping_and_failing(tab: Page, tokenizer) -> None:
    with saying(tokenizer, "word " * 200, pause=0.05) as (address, engine):
        tab.open(address)
        say(tab, "Hello")
        tab.wait("document.querySelector('.text')?.textContent.includes('word')")
        assert text(tab, "#send") == "Stop"
        tab.press("Escape")
        tab.wait("document.querySelector('.problem')?.textContent === 'Stopped.'")
        assert engine.last.wait(5) and engine.tickets[-1].cancelled
        assert text(tab, "#send") == "Send"
    with saying(tokenizer, "Fine.", fails="Out of memory.") as (address, _):
        tab.open(address)
        say(tab, "Hello")
        tab.wait("document.querySelector('.problem')?.textContent === 'Out of memory.'")
    with saying(tokenizer, "Fine.", Protection(keys=["secret"])) as (address, _):
        tab.open(address)
        tab.wait("document.getElementById('draft').textContent.includes('needs a key')")
        tab.run("sessionStorage.setItem('dflash.key', 'secret')")
        tab.open(f"{address}/?")
        tab.wait("document.getElementById('model').textContent === 'tiny'")
        say(tab, "Hello")
        tab.wait("document.querySelector('.text')?.textContent === 'Fine.'")
