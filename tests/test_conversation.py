"""Conversations: what is reused of a cache changes nothing in the text."""

import copy
import json
from functools import cache
from itertools import islice
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from dflash_mlx.conversation import Template, check_positions, max_positions, storage
from dflash_mlx.conversation.conversation import Conversation
from dflash_mlx.conversation.prefixes import common_prefix
from dflash_mlx.conversation.thinking import Parts
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.errors import DFlashError
from dflash_mlx.pairs import SpeculativeModel
from tests.families.configs import VOCAB
from tests.families.models import build
from tests.tiny_pair import vocabulary, write_tokenizer

TOKENS = 12
TURNS = [
    "Hello there.",
    "And what is 2 + 2?",
    "Why?",
    "A longer question, to pass a window or two.",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    # Without marks for thinking: models with random weights would write them anywhere.
    words = [word for word in vocabulary("") if "think" not in word]
    words += ["ä", "ö", "ü"][: VOCAB - len(words)]
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, words)
    return load_tokenizer(folder)


@cache
def pair(family: str) -> SpeculativeModel:
    target = build(family)
    layers = len(target.layers)
    config = {
        "architectures": ["DFlashDraftModel"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "block_size": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "dflash_config": {"target_layer_ids": [0, layers - 2], "mask_token_id": 5},
    }
    mx.random.seed(1)
    return SpeculativeModel(target, DFlashDraft(draft_config(config)))


def plain(model: SpeculativeModel, template: Template, messages: list) -> str:
    """What plain mlx_lm answers to a conversation, run afresh."""
    prompt = template.render(messages)
    ids = []
    for token, _ in generate_step(mx.array(prompt), model.target, max_tokens=TOKENS):
        if token in template.tokenizer.eos_token_ids:
            break
        ids.append(int(token))
    return template.tokenizer.decode(ids)


def ask(conversation: Conversation, text: str, **options) -> str:
    return "".join(piece.text for piece in conversation.ask(text, TOKENS, **options))


def figures(conversation: Conversation) -> tuple[int, int, int]:
    """Tokens of the last prompt, how many of them were reused, and tokens of the answer."""
    last = conversation.last
    assert last is not None and last.reused_tokens is not None
    return last.prompt_tokens, last.reused_tokens, last.tokens


# Caches that can be cut; windows; recurrent state; both; a class of its own.
FAMILIES = ["qwen3", "gemma3_text", "qwen3_5", "recurrent_gemma", "mamba2", "deepseek_v41"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("think", [None, False])
def test_every_turn_is_what_a_fresh_prefill_gives(family, think, tokenizer):
    model = pair(family)
    # Without thinking the template ends prompts with a mark that it leaves out of later ones.
    template = Template(tokenizer, "Be kind.", think)
    conversation = Conversation(model, template)
    for turn in TURNS:
        asked = [*conversation.messages, {"role": "user", "content": turn}]
        assert ask(conversation, turn, prefill_step_size=16) == plain(model, template, asked)
        assert conversation.messages[-2:][0] == asked[-1]
        prompt_tokens, reused, _ = figures(conversation)
        assert prompt_tokens == len(template.render(asked))
        assert len(asked) == 1 or reused > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_runs_only_what_is_new(family, tokenizer):
    model, template = pair(family), Template(tokenizer, think=False)
    conversation = Conversation(model, template)
    ask(conversation, "A first question of some length, so that its tokens are worth keeping.")
    first, *_ = figures(conversation)
    ask(conversation, "Again.")
    # All of the first prompt but the mark that thinking is off.
    mark = tokenizer.encode("<think></think>", add_special_tokens=False)
    _, reused, _ = figures(conversation)
    assert first - reused <= len(mark)


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_of_the_past(family, tokenizer):
    model, template = pair(family), Template(tokenizer)
    conversation = Conversation(model, template)
    ask(conversation, TURNS[0])
    ask(conversation, TURNS[1])
    for change in ("system", "forgotten turn", "think", "reset"):
        if change == "system":
            template.system = "Be brief."
        elif change == "forgotten turn":
            del conversation.messages[-2:]
        elif change == "think":
            template.think = False
        else:
            conversation.reset()
        asked = [*conversation.messages, {"role": "user", "content": TURNS[2]}]
        assert ask(conversation, TURNS[2]) == plain(model, template, asked), change


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_was_stopped_is_kept_as_far_as_it_came(family, tokenizer):
    model, template = pair(family), Template(tokenizer)
    conversation = Conversation(model, template)
    pieces = conversation.ask(TURNS[0], TOKENS)
    said = "".join(piece.text for piece in islice(pieces, 2))
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    assert conversation.finish_reason is None
    asked = [*conversation.messages, {"role": "user", "content": TURNS[1]}]
    assert ask(conversation, TURNS[1]) == plain(model, template, asked)


def test_a_question_without_an_answer_is_forgotten(tokenizer):
    model = pair("qwen3")
    conversation = Conversation(model, Template(tokenizer))

    def broken(done: int, total: int) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ask(conversation, TURNS[0], prompt_progress_callback=broken)
    assert conversation.messages == []
    asked = [{"role": "user", "content": TURNS[1]}]
    assert ask(conversation, TURNS[1]) == plain(model, conversation.template, asked)


def test_without_a_template_contents_follow_each_other(tokenizer):
    template = Template(tokenizer, raw=True)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    assert tokenizer.decode(template.render(messages)) == "abcd"
    conversation = Conversation(pair("mamba2"), template)
    for turn in TURNS[:3]:
        asked = [*conversation.messages, {"role": "user", "content": turn}]
        assert ask(conversation, turn) == plain(conversation.model, template, asked)


def test_prompts_beyond_the_positions_are_refused_before_they_run(tokenizer):
    model = pair("qwen3")
    most = max_positions(model.target)
    assert most == 4096
    check_positions(model.target, most - 1)
    with pytest.raises(DFlashError, match="only 4096 positions"):
        check_positions(model.target, most)
    conversation = Conversation(model, Template(tokenizer))
    with pytest.raises(DFlashError, match="only 4096 positions"):
        ask(conversation, "x" * most)
    assert conversation.messages == [] and conversation.cached_tokens == 0


def test_answers_end_with_the_positions(tokenizer):
    model = pair("qwen3")
    conversation = Conversation(model, Template(tokenizer))
    overhead = len(conversation.template.render([{"role": "user", "content": ""}]))
    pieces = list(conversation.ask("x" * (4096 - overhead - 3), -1))
    assert figures(conversation)[2] <= 3 and pieces
    assert conversation.finish_reason in ("length", "stop")


THINK = {"<think>": True, "</think>": False}
HARMONY = {"<|a|>": True, "<|f|>": False, "<|end|>": None}


@pytest.mark.parametrize(
    ("marks", "text", "thinking", "expected"),
    [
        (THINK, "<think>hm</think>yes", False, [("hm", True), ("yes", False)]),
        (THINK, "hm</think>yes", True, [("hm", True), ("yes", False)]),
        (THINK, "a < b <thin ice", False, [("a < b <thin ice", False)]),
        (THINK, "a<", False, [("a<", False)]),
        (THINK, "", False, []),
        ({}, "<think>x", False, [("<think>x", False)]),
        (HARMONY, "<|a|>hm<|end|><|f|>yes<|end|>", False, [("hm", True), ("yes", False)]),
    ],
)
def test_parts_do_not_depend_on_how_the_text_is_cut(marks, text, thinking, expected):
    for size in range(1, len(text) + 2):
        parts = Parts(marks, thinking)
        pieces = [p for i in range(0, len(text), size) for p in parts.feed(text[i : i + size])]
        pieces += parts.finish()
        joined: list[tuple[str, bool]] = []
        for piece, thought in pieces:
            if joined and joined[-1][1] == thought:
                joined[-1] = (joined[-1][0] + piece, thought)
            else:
                joined.append((piece, thought))
        assert joined == expected


def test_parts_hold_nothing_back_that_cannot_be_a_mark():
    parts = Parts(THINK)
    assert list(parts.feed("plain text")) == [("plain text", False)]
    assert list(parts.feed("a <th")) == [("a ", False)]
    assert list(parts.feed("e end")) == [("<the end", False)]


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0


def test_saved_conversations_come_back(tmp_path):
    messages = [
        {"role": "user", "content": 'ä\n"q"'},
        {"role": "assistant", "content": "x", "reasoning_content": "hm"},
    ]
    storage.save(tmp_path / "c.json", messages, model="m", system=None)
    content = storage.load(tmp_path / "c.json")
    assert content["messages"] == messages and content["model"] == "m"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no file"),
        ("nonsense", "not JSON"),
        ("[]", "no saved conversation"),
        (json.dumps({"messages": []}), "no saved conversation"),
        (json.dumps({"format": "dflash-mlx conversation", "messages": [1]}), "damaged"),
        (json.dumps({"format": "dflash-mlx conversation"}), "damaged"),
    ],
)
def test_other_files_are_no_conversations(tmp_path: Path, content, said):
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DFlashError, match=said):
        storage.load(file)


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(DFlashError, match="cannot be written"):
        storage.save(tmp_path / "nowhere" / "c.json", [])
    with pytest.raises(DFlashError, match="cannot be read"):
        storage.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "unasked", "on", "off"),
    [
        ("{{ 'D' if enable_thinking is defined else 'U' }}", "U", "D", "D"),
        ("{{ enable_thinking | default('own') }}", "own", "True", "False"),
        ("{{ enable_thinking is not defined or enable_thinking }}", "True", "True", "False"),
        ("{% if enable_thinking %}yes{% else %}no{% endif %}", "no", "yes", "no"),
    ],
)
def test_a_template_decides_by_itself_whether_it_thinks(tokenizer, source, unasked, on, off):
    own = copy.copy(tokenizer._tokenizer)
    own.chat_template = source
    asked = [{"role": "user", "content": "x"}]
    for think, text in ((None, unasked), (True, on), (False, off)):
        template = Template(TokenizerWrapper(own), think=think)
        assert template.text(asked) == text
