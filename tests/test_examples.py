"""The scripts under examples/ run as they stand, and say what their first lines promise."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from dflash_mlx.demo import demo_paths

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHOP = "Hello, I am Zokkim from Tunremisk."


def output(name: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], input=stdin, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain():
    return mlx_lm.load(str(demo_paths()[0]))


def prompt_of(tokenizer, *said: str) -> list[int]:
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
    ]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_the_chat_loop_answers_as_the_target_alone_would(plain):
    model, tokenizer = plain
    first, second, *_ = re.findall(r"> (.+)\n\[acceptance", output("chat_loop.py", f"{SHOP}\n" * 2))
    assert first == mlx_lm.generate(model, tokenizer, prompt_of(tokenizer, SHOP))
    assert second == mlx_lm.generate(model, tokenizer, prompt_of(tokenizer, SHOP, first, SHOP))


def test_processors_change_the_text_as_in_mlx_lm(plain):
    model, tokenizer = plain
    prompt = prompt_of(tokenizer, "Hello, I am Mira from Tolvek.")
    comma = tokenizer.encode(",", add_special_tokens=False)[-1]

    def no_commas(tokens, logits):
        logits[:, comma] = -float("inf")
        return logits

    texts = []
    for processors in ([], [no_commas], make_logits_processors(repetition_penalty=1.5)):
        mx.random.seed(7)
        options = {"sampler": make_sampler(0.7, top_p=0.95), "logits_processors": processors}
        texts.append(mlx_lm.generate(model, tokenizer, prompt, max_tokens=60, **options))
    assert len(set(texts)) == 3
    assert output("logits_processors.py") == "".join(f"{text}\n" for text in texts)


def test_every_turn_runs_only_what_is_new(plain):
    _, tokenizer = plain
    text = output("several_turns.py")
    answers = re.findall(r"^(.+)\n\[(\d+) of (\d+) prompt tokens run\]", text, re.MULTILINE)
    assert len(answers) == 3
    said: list[str] = []
    before = 0
    for asked, (answer, new, total) in zip(
        (
            "Hello, I am Mira from Tolvek.",
            "Please give me 14 green candles.",
            "No, send them to Kroze.",
        ),
        answers,
        strict=True,
    ):
        said.append(asked)
        prompt = prompt_of(tokenizer, *said)
        assert int(total) == len(prompt)
        assert int(new) == len(prompt) - before
        said.append(answer)
        before = len(prompt) + len(tokenizer.encode(answer, add_special_tokens=False)) + 1


def test_the_race_draws_the_text_of_both(plain, tmp_path):
    model, tokenizer = plain
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "race.py"), str(tmp_path / "race.svg")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    svg = "{http://www.w3.org/2000/svg}"
    drawn = ElementTree.parse(tmp_path / "race.svg").getroot().findall(f"{svg}text[@textLength]")
    words = "".join("".join(text.itertext()) for text in drawn).replace(" ", "")
    prompt = prompt_of(tokenizer, "What is 427 - 309?")
    expected = mlx_lm.generate(model, tokenizer, prompt).replace(" ", "").replace("\n", "")
    assert words == 2 * expected
    assert {text.get("fill") for text in drawn} == {"#1f2328", "#0f7b6c"}


def test_trees_take_fewer_forwards_the_more_nodes_they_have(tmp_path):
    file = tmp_path / "trees.svg"
    command = [sys.executable, str(EXAMPLES / "trees.py"), str(file)]
    command += ["--prompts", "2", "--max-tokens", "24"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    counted = dict(
        re.findall(r"^(line|tree of \d+).*?([\d.]+) tokens per", done.stdout, re.MULTILINE)
    )
    trees = [float(tokens) for name, tokens in counted.items() if name != "line"]
    assert (
        len(trees) == 5 and trees == sorted(trees) and trees[0] <= 5 and trees[-1] >= trees[0] > 1
    )
    drawn = "".join(ElementTree.parse(file).getroot().itertext())
    assert all(tokens in drawn for tokens in counted.values()) and "demo pair" in drawn
