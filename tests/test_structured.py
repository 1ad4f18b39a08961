"""Structured output: the text of plain mlx_lm under the same mask, with speculation on."""

import json
import re
from collections.abc import Callable

import llguidance.hf
import mlx.core as mx
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler as plain_sampler
from mlx_lm.tokenizer_utils import load as load_tokenizer

from dflash_mlx.api import make_decoder
from dflash_mlx.decode import Decoder, Options, OwnState, make_sampler
from dflash_mlx.errors import DFlashError
from dflash_mlx.server.structured import Grammar, Grammars
from tests.families.configs import VOCAB
from tests.test_conversation import FAMILIES, pair
from tests.test_copying import Eager
from tests.tiny_pair import vocabulary, write_tokenizer

TOKENS = 60
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["first kind", "second kind"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "count"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": Grammar.json_schema(SCHEMA),
    "object": Grammar.json_object(),
    "regex": Grammar.regex(r"(yes|no), because [a-z ]{3,12}\."),
    "lark": Grammar.lark('start: "<<" WORD ("," WORD){2} ">>"\nWORD: /[a-c]{1,3}/'),
}
PROMPT = [7, 20, 33, 46, 59, 72, 11]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = [*vocabulary(""), "ä", "ö", "ü"][:VOCAB]
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, words)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB)


def masked(tokenizer, grammar: Grammar) -> Callable[[mx.array, mx.array], mx.array]:
    """The same mask as a logits processor, made from llguidance alone."""
    words = llguidance.hf.from_tokenizer(
        tokenizer._tokenizer, n_vocab=VOCAB, eos_token=sorted(tokenizer.eos_token_ids)
    )
    matcher = LLMatcher(words, grammar.compiled())
    after = [list(end) for end in grammar.after]
    begun, seen = not after, len(PROMPT)

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal begun, seen
        ids = tokens.tolist()
        for i in range(seen, len(ids)):
            if begun:
                matcher.try_consume_tokens([ids[i]])
            begun = begun or any(ids[len(PROMPT) : i + 1][-len(end) :] == end for end in after)
        seen = len(ids)
        if not begun:
            return logits
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:VOCAB].astype(bool)
        return mx.where(mx.array(allowed), logits, -mx.inf)

    return process


def plain(model, tokenizer, grammar: Grammar, seed: int | None = None) -> list[int]:
    if seed is not None:
        mx.random.seed(seed)
    steps = generate_step(
        mx.array(PROMPT),
        model.target,
        max_tokens=TOKENS,
        sampler=None if seed is None else plain_sampler(1.0),
        logits_processors=[masked(tokenizer, grammar)],
    )
    ids: list[int] = []
    for token, _ in steps:
        ids.append(int(token))
        if ids[-1] in tokenizer.eos_token_ids:
            break
    return ids


def options_of(tokenizer, grammars, grammar, seed) -> Options:
    return Options(
        max_tokens=TOKENS,
        stop_tokens=frozenset(tokenizer.eos_token_ids),
        guide=grammars.guide(grammar),
        sampler=make_sampler(0.0 if seed is None else 1.0),
        random_state=OwnState(seed or 0),
    )


def guided(model, tokenizer, grammars, grammar, length, seed=None) -> tuple[list[int], object]:
    options = options_of(tokenizer, grammars, grammar, seed)
    decoder = make_decoder(model, model.make_cache(), options, length)
    return [token.id for token in decoder.run(PROMPT)], decoder.statistics


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("length", [0, 1, 3, "auto"])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_text_is_that_of_plain_decoding_under_the_mask(name, length, seed, tokenizer, grammars):
    model, grammar = pair("qwen3"), GRAMMARS[name]
    ids, _ = guided(model, tokenizer, grammars, grammar, length, seed)
    assert ids == plain(model, tokenizer, grammar, seed)
    ended = ids[-1] in tokenizer.eos_token_ids
    text = tokenizer.decode(ids[:-1] if ended else ids)
    if name == "regex":
        assert ended and re.fullmatch(r"(yes|no), because [a-z ]{3,12}\.", text)
    if name in ("schema", "object") and ended:
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("name", ["schema", "object"])
@pytest.mark.parametrize("seed", [None, 5])
def test_copies_pass_through_the_mask(name, seed, tokenizer, grammars, monkeypatch):
    monkeypatch.setattr("dflash_mlx.propose.copies.LEAST", 0.0)
    model, grammar = pair("qwen3"), GRAMMARS[name]
    options = options_of(tokenizer, grammars, grammar, seed)
    decoder = Decoder(
        model.view,
        model.draft,
        model.make_cache(),
        Eager(),
        options,
        drafting=True,
        keep_cache=False,
    )
    ids = [token.id for token in decoder.run(PROMPT)]
    assert ids == plain(model, tokenizer, grammar, seed)
    assert decoder.statistics.copies > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_cache(family, tokenizer, grammars):
    model = pair(family)
    ids, statistics = guided(model, tokenizer, grammars, GRAMMARS["schema"], 3)
    assert ids == plain(model, tokenizer, GRAMMARS["schema"])
    assert statistics.accepted > 0


def test_what_must_come_is_proposed_for_nothing(tokenizer, grammars):
    model, grammar = pair("qwen3"), Grammar.regex("All of this is fixed[.!]")
    for length in (0, 3, "auto"):
        ids, statistics = guided(model, tokenizer, grammars, grammar, length)
        assert tokenizer.decode(ids[:-1])[:-1] == "All of this is fixed"
        # Three forced proposals and one that follows from each forward.
        assert statistics.target_forwards <= 8
        assert ids == plain(model, tokenizer, grammar)


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_the_grammar_begins_behind_the_thinking(length, seed, tokenizer, grammars):
    model = pair("qwen3")
    never = GRAMMARS["regex"].behind((1, 2, 3, 4))
    free, _ = guided(model, tokenizer, grammars, never, length, seed)
    # What the model happens to write is taken for the end of its thinking.
    end = tuple(free[4:6])
    grammar = GRAMMARS["regex"].behind((1, 2, 3, 4), end)
    ids, _ = guided(model, tokenizer, grammars, grammar, length, seed)
    assert ids == plain(model, tokenizer, grammar, seed)
    text = tokenizer.decode(ids[6:])
    assert ids[4:6] == list(end) and text.startswith(("yes, because ", "no, because "))


def test_a_grammar_that_never_begins_rules_nothing(tokenizer, grammars):
    model = pair("qwen3")
    ids, _ = guided(model, tokenizer, grammars, GRAMMARS["regex"].behind((1, 2, 3, 4, 5)), 3)
    reference = generate_step(mx.array(PROMPT), model.target, max_tokens=TOKENS)
    assert ids == [int(t) for t, _ in reference][: len(ids)]


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar.regex("a("), "unclosed group|invalid regex"),
        (Grammar.lark("foo: bar"), "start"),
        (Grammar.json_schema({"type": "nonsense"}), "nonsense"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar("json_schema", "[1"), "cannot be kept"),
        (Grammar("json_schema", "[" * 5000), "cannot be kept"),
    ],
)
def test_formats_that_cannot_be_kept(grammar, said, grammars):
    with pytest.raises(DFlashError, match=said) as error:
        grammars.guide(grammar)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('{"a": 1}', True),
        ('{"a":1}', True),
        ('{\n  "a": [\n    1\n  ]\n}', True),
        ('{"a"' + 17 * " ", False),
        ("{\n\n", False),
    ],
)
@pytest.mark.parametrize("schema", [{"type": "object"}, {}, True])
def test_json_may_be_indented_and_does_not_go_on_with_blanks(schema, text, allowed):
    words = LLTokenizer("byte")
    matcher = LLMatcher(words, Grammar.json_schema(schema).compiled())
    tokens = words.tokenize_str(text)
    assert (matcher.try_consume_tokens(tokens) == len(tokens)) is allowed
