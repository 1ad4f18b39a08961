"""The embedded demo pair: its text is what it says, and the pair does what it promises."""

import contextlib
import io
import json
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from dflash_mlx import load
from dflash_mlx.demo import demo_paths, demo_prompts
from dflash_mlx.demo.making.check import Score, score
from dflash_mlx.demo.making.prompts import bench_prompts
from dflash_mlx.demo.making.target import Lesson, encode, last_answer, taught, train_target
from dflash_mlx.demo.making.text import (
    KINDS,
    early_example,
    example,
    practice_example,
    training_example,
)
from dflash_mlx.demo.making.tokenizer import (
    END,
    MASK,
    SPECIALS,
    save_tokenizer,
    train_tokenizer,
)
from dflash_mlx.demo.making.words import Words, training_may_use

SPAN = 8


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(demo_paths()[0] / "tokenizer.json"))


@pytest.fixture(scope="module")
def pair():
    return load(*demo_paths())


def held_out_examples(count):
    return [
        example(kind, split, seed)
        for kind in KINDS
        for split in ("held-out", "novel")
        for seed in range(count)
    ]


def test_the_same_arguments_give_the_same_text():
    for kind in KINDS:
        assert example(kind, "held-out", 5) == example(kind, "held-out", 5)
        assert example(kind, "held-out", 5) != example(kind, "held-out", 6)
    assert training_example("a/1") == training_example("a/1")


def test_training_draws_no_held_out_value_and_the_others_draw_nothing_else():
    for write in (early_example, practice_example, training_example):
        slots = [slot for seed in range(200) for slot in write(seed).slots]
        assert len(slots) > 400
        assert all(training_may_use(slot) for slot in slots)
    for item in held_out_examples(40):
        assert item.slots
        assert not any(training_may_use(slot) for slot in item.slots)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held-out"):
        Words(None, "test")


def test_held_out_prompts_share_no_long_span_with_the_training_text(tokenizer):
    """Spans of 8 tokens that hold a whole name, word or number; the rest is template."""

    def spans(text):
        encoding = tokenizer.encode(text)
        for i in range(len(encoding.ids) - SPAN + 1):
            offsets = encoding.offsets[i : i + SPAN]
            yield tuple(encoding.ids[i : i + SPAN]), text[offsets[0][0] : offsets[-1][1]]

    trained = {
        ids
        for write in (early_example, practice_example, training_example)
        for seed in range(800)
        for message in write(f"1/{seed}").messages
        for ids, _ in spans(message["content"])
    }
    templates = checked = 0
    for item in held_out_examples(30):
        for message in item.prompt:
            for ids, text in spans(message["content"]):
                if any(re.search(rf"\b{slot}\b", text.lower()) for slot in item.slots):
                    assert ids not in trained, text
                    checked += 1
                else:
                    templates += ids in trained
    assert checked > 3000
    assert templates > 100  # the comparison does find spans that are shared


def test_answers_differ_from_each_other():
    answers = [item.answer for item in held_out_examples(40)]
    assert len(set(answers)) == len(answers)


def test_sums_and_differences_are_right():
    for seed in range(200):
        item = example("arithmetic", "held-out", seed)
        a, sign, b, result = re.search(r"So (\d+) ([+-]) (\d+) = (\d+)\.", item.answer).groups()
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert {int(a), int(b)} == {int(n) for n in re.findall(r"\d+", item.prompt[0]["content"])}
        steps = re.findall(r": (.+) = (\d+), write (\d)", item.answer)
        assert len(steps) == 3
        for terms, total, digit in steps:
            assert eval(terms) == int(total)
            assert int(total) % 10 == int(digit)
        assert "".join(digit for _, _, digit in reversed(steps)).lstrip("0") in ("", result)


CALLS = {  # the first that is found in the request
    "sums": ([1, 2, 3], lambda x, n: sum(x) + n),
    "adds": (5, lambda x, n: x + n),
    "subtracts": (5, lambda x, n: x - n),
    "multiplies": (5, lambda x, n: x * n),
    "divides": (5, lambda x, n: x / n),
    "tells whether (.*) larger": (500, lambda x, n: x > n),
    "tells whether (.*) smaller": (500, lambda x, n: x < n),
    "takes": (list(range(2000)), lambda x, n: x[:n]),
    "repeats": ("ab", lambda x, n: x * n),
    "counts": (list(range(1000)), lambda x, n: sum(i > n for i in x)),
    "keeps": (list(range(1000)), lambda x, n: [i for i in x if i < n]),
    "prints": ("ab", lambda x, n: n),
}


def test_functions_do_what_was_asked():
    seen = set()
    for seed in range(150):
        item = example("function", "held-out", seed)
        asked = item.prompt[0]["content"]
        operation = next(name for name in CALLS if re.search(name, asked))
        argument, expected = CALLS[operation]
        number = int(re.search(r"\d+", asked).group())
        name = re.search(r"def (\w+)\(", item.answer).group(1)
        assert name in asked
        namespace = {}
        exec(re.search(r"```python\n(.*?)```", item.answer, re.DOTALL).group(1), namespace)
        with contextlib.redirect_stdout(io.StringIO()):
            assert namespace[name](argument) == expected(argument, number)
        seen.add(operation)
    assert seen == set(CALLS)


def test_records_are_json_with_what_was_told():
    for seed in range(100):
        item = example("record", "held-out", seed)
        fields = json.loads(re.search(r"```json\n(.*?)```", item.answer, re.DOTALL).group(1))
        asked = item.prompt[0]["content"]
        assert len(fields) in (4, 5)
        assert all(str(value) in asked for value in fields.values())


def test_practice_sums_are_right():
    lines = 0
    for seed in range(150):
        for message in practice_example(seed).messages:
            for terms, total, digit in re.findall(
                r"^([\d +-]+) = (\d+), write (\d)\.$", message["content"], re.MULTILINE
            ):
                assert eval(terms) == int(total)
                assert int(total) % 10 == int(digit)
                lines += 1
    assert lines > 100


def test_answers_to_questions_are_what_the_facts_say():
    for seed in range(100):
        item = example("question", "held-out", seed)
        told, asked = re.match(r"(.*\.) (Wh.*)", item.prompt[0]["content"]).groups()
        facts = dict(re.findall(r"The (\w+) of \w+ is called (\w+)\.", told))
        thing = re.search(r"the (\w+) of", asked).group(1)
        assert item.answer.endswith(f"So the answer is {facts[thing]}.")


def test_tokenizer_splits_digits_and_loses_nothing(tmp_path):
    texts = [m["content"] for seed in range(300) for m in training_example(seed).messages]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == list(range(len(SPECIALS)))
    for text in [*texts, "Grüße, 今日は\n\t  x_1 = [2.5]; naïve 12345"]:
        encoding = tokenizer.encode(text)
        assert tokenizer.decode(encoding.ids) == text
        assert not any(re.search(r"\d.|.\d", token) for token in encoding.tokens)
    save_tokenizer(tokenizer, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a 12").ids


def test_chat_template_renders_what_training_saw(pair, tokenizer):
    _, wrapped = pair
    assert wrapped.eos_token_ids == {tokenizer.token_to_id(END)}
    for seed in range(30):
        item = training_example(seed)
        sample = encode(tokenizer, item)
        messages = list(item.messages)
        assert wrapped.apply_chat_template(messages, return_dict=False) == sample.tokens.tolist()
        prompt = wrapped.apply_chat_template(
            item.prompt, add_generation_prompt=True, return_dict=False
        )
        assert prompt == sample.tokens[: last_answer(sample)].tolist()
        assert sample.learn[last_answer(sample) :].all()


def test_the_pair_is_small_float32_and_of_published_form():
    target, draft = demo_paths()
    files = [*target.glob("*"), *draft.glob("*")]
    assert sum(file.stat().st_size for file in files) <= 12 * 2**20
    for directory in (target, draft):
        weights = mx.load(str(directory / "model.safetensors"))
        assert {array.dtype for array in weights.values()} == {mx.float32}
        config = json.loads((directory / "config.json").read_text())
        assert config["model_type"] == "qwen3"
        assert config["max_position_embeddings"] == 32768
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"]["mask_token_id"] == SPECIALS.index(MASK)


def test_the_prompts_are_those_that_the_code_makes():
    prompts = demo_prompts()
    rows = [{"set": p.group, "kind": p.kind, "messages": list(p.messages)} for p in prompts]
    assert rows == bench_prompts()
    assert {p.group for p in demo_prompts("held-out", "bad")} == {"held-out", "bad"}
    assert {p.kind for p in demo_prompts("held-out")} == set(KINDS)


def test_lessons_follow_each_other_and_a_text_goes_on_where_it_stopped(tokenizer):
    lessons = (
        Lesson(300, early_example, 1.0, 0.5),
        Lesson(2, practice_example, 0.5, 0.5),
        Lesson(2, early_example, 0.5, 0.0),
    )
    steps = list(taught(tokenizer, 2048, 1, lessons))
    rates = [rate for _, rate in steps]
    assert rates[0] == pytest.approx(1 / 200)
    assert rates[200:] == pytest.approx(
        [*np.linspace(1, 0.5, 300, False)[200:], 0.5, 0.5, 0.5, 0.25]
    )
    alike = list(taught(tokenizer, 2048, 1, [Lesson(302, early_example, 1.0, 1.0)]))
    for (batch, _), (other, _) in zip([*steps[:300], *steps[302:]], alike, strict=True):
        assert np.array_equal(batch.tokens, other.tokens)


def test_target_training_goes_on_where_it_was_stopped(tokenizer, tmp_path):
    lessons = (Lesson(2, early_example, 1e-3, 1e-3), Lesson(2, practice_example, 1e-3, 0.0))

    def train(directory, lessons):
        model = train_target(tokenizer, directory, lessons, 256, scored=1, log=lambda line: None)
        return [array for _, array in tree_flatten(model.parameters())]

    whole = train(tmp_path / "whole", lessons)
    first = train(tmp_path / "parts", lessons[:1])
    second = train(tmp_path / "parts", lessons)
    assert all(mx.array_equal(a, b) for a, b in zip(whole, second, strict=True))
    assert not all(mx.array_equal(a, b) for a, b in zip(whole, first, strict=True))


@pytest.fixture(scope="module")
def held_out_scores(pair):
    return {
        kind: score(
            *pair,
            [example(kind, "held-out", f"test/{seed}") for seed in range(10)],
            verify_length=None,
        )
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_answers_rightly(held_out_scores, kind):
    assert held_out_scores[kind].examples == 10
    assert held_out_scores[kind].right >= 8


def test_the_draft_is_accepted(held_out_scores):
    assert sum(held_out_scores.values(), Score()).acceptance_length >= 6


def test_the_draft_is_accepted_for_words_it_never_saw(pair):
    examples = [example(kind, "novel", f"test/{seed}") for kind in KINDS for seed in range(4)]
    assert score(*pair, examples, verify_length=None).acceptance_length >= 4.5


def test_a_score_tells_wrong_answers_from_right_ones(pair):
    good = example("function", "held-out", "test/0")
    wrong = type(good)(good.kind, (*good.prompt, {"role": "assistant", "content": "No."}), ())
    assert score(*pair, [good, wrong]).right == score(*pair, [good]).right
    assert Score(2, 1, 20, 6).acceptance_length == 3
    assert Score(2, 1, 20, 6) + Score(1, 1, 3, 2) == Score(3, 2, 23, 8)
