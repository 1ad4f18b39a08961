"""Tokens to thinking, text and calls: every format, however the text is cut into tokens."""

import importlib
import itertools
import json
import pkgutil
from types import SimpleNamespace
from typing import Any

import mlx_lm.tool_parsers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import TextStateMachine, make_text_state_machine

from dflash_mlx.conversation.harmony import Messages
from dflash_mlx.server.calls import Call, reader
from dflash_mlx.server.channels import Channels, Text, joined
from dflash_mlx.server.formats import transitions
from dflash_mlx.server.splitting import HarmonySplitter, MarkerSplitter

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
# How each of mlx_lm's parsers is written by its models: a call of weather(city="Oslo", days=2).
WRITTEN = {
    "function_gemma": (
        "<start_function_call>call:weather{city:<escape>Oslo<escape>,days:2}<end_function_call>"
    ),
    "gemma4": '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>',
    "glm47": (
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>"
    ),
    "json_tools": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"city": "Oslo", "days": 2}<|tool_call_end|>'
        "<|tool_calls_section_end|>"
    ),
    "kimi_k3": (
        '<|open|>tools<|sep|><|open|>call tool="weather" index="1"<|sep|>'
        '<|open|>argument key="city" type="string"<|sep|>Oslo<|close|>argument<|sep|>'
        '<|open|>argument key="days" type="number"<|sep|>2<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>"
    ),
    "longcat": (
        "<longcat_tool_call>weather<longcat_arg_key>city</longcat_arg_key>"
        "<longcat_arg_value>Oslo</longcat_arg_value><longcat_arg_key>days</longcat_arg_key>"
        "<longcat_arg_value>2</longcat_arg_value></longcat_tool_call>"
    ),
    "minicpm5": (
        '<function name="weather"><param name="city">Oslo</param><param name="days">2</param>'
        "</function>"
    ),
    "minimax_m2": (
        '<minimax:tool_call><invoke name="weather"><parameter name="city">Oslo</parameter>'
        '<parameter name="days">2</parameter></invoke></minimax:tool_call>'
    ),
    "mistral": '[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 2}',
    "muse_spark": (
        '<atem:function_calls><atem:invoke name="weather">'
        '<atem:parameter name="city">Oslo</atem:parameter>'
        '<atem:parameter name="days">2</atem:parameter></atem:invoke></atem:function_calls>'
    ),
    "pythonic": '<|tool_call_start|>[weather(city="Oslo", days=2)]<|tool_call_end|>',
    "qwen3_coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
    ),
}
WRITTEN["laguna"] = WRITTEN["glm47"]


class Letters:
    """A detokenizer whose tokens are strings."""

    def __init__(self) -> None:
        self.last_segment = ""

    def add_token(self, token: Any) -> None:
        self.last_segment = token

    def finalize(self) -> None:
        self.last_segment = ""


def writer(name: str = "", **more: Any) -> Any:
    """What is looked at of a tokenizer whose model writes calls in one of mlx_lm's formats."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}") if name else None
    return SimpleNamespace(
        **{
            "has_thinking": True,
            "think_start": "<think>",
            "think_end": "</think>",
            "has_tool_calling": module is not None,
            "tool_call_start": module and module.tool_call_start,
            "tool_call_end": module and module.tool_call_end,
            "tool_parser": module and module.parse_tool_call,
            "structural_markers": (),
            "response_transitions": {},
            "response_initial_state": None,
            "get_vocab": dict,
            **more,
        }
    )


def harmony() -> Any:
    vocabulary = dict.fromkeys(["<|channel|>", "<|message|>", "<|start|>"], 0)
    return writer(has_thinking=False, get_vocab=lambda: vocabulary)


def read(tokenizer: Any, tokens: list[str], state: str = "text", **options: Any) -> Any:
    """All pieces of an answer, neighbours joined; and the channels."""
    splitter: Any = MarkerSplitter(transitions(tokenizer, True), state)
    if state == "header":
        splitter = HarmonySplitter(Messages(opened="<|start|>assistant "))
    read_calls = reader(tokenizer, TOOLS)
    channels = Channels(Letters(), splitter, read_calls=read_calls, **options)
    pieces = [piece for token in tokens for piece in channels.feed([token])]
    return joined(pieces + channels.finish(True)), channels


def cut(text: str, places: list[int]) -> list[str]:
    """A text in pieces, cut at these places."""
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def plain(pieces: list[Any]) -> list[Any]:
    shown = []
    for piece in pieces:
        if isinstance(piece, Call):
            shown.append((piece.name, json.loads(piece.arguments)))
        else:
            shown.append((type(piece).__name__, piece.text))
    return shown


def test_every_parser_of_mlx_lm_has_an_example() -> None:
    modules = pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)
    assert {module.name for module in modules} == WRITTEN.keys()


@pytest.mark.parametrize("name", sorted(WRITTEN))
@given(places=st.lists(st.integers(0, 500), max_size=30))
def test_calls_of_every_format(name: str, places: list[int]) -> None:
    tokens = cut(f"<think>Hm.</think>\n\nI look.\n{WRITTEN[name]}", places)
    pieces, channels = read(writer(name), tokens)
    called = ("weather", {"city": "Oslo", "days": 2})
    assert plain(pieces) == [("Thinking", "Hm."), ("Text", "I look."), called]
    assert channels.called


@given(places=st.lists(st.integers(0, 500), max_size=30))
def test_harmony(places: list[int]) -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
        ' to=functions.weather <|constrain|>json<|message|>{"city": "Oslo", "days": 2}<|call|>'
        "<|start|>assistant<|channel|>final<|message|>Rain."
    )
    pieces, _ = read(harmony(), cut(text, places), "header")
    called = ("weather", {"city": "Oslo", "days": 2})
    assert plain(pieces) == [("Thinking", "Hm."), called, ("Text", "Rain.")]


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_the_markers_are_those_of_mlx_lm(name: str) -> None:
    """What is read of the tokenizer agrees with mlx_lm's own reading of it."""
    tokenizer = writer(name)
    text = f"<think>Hm.</think>A{WRITTEN[name]}B"
    machine = make_text_state_machine(tokenizer)
    _, theirs = TextStateMachine.split(machine.make_state("normal"), text)
    names = {"normal": "text", "reasoning": "thinking", "tool": "tool"}
    splitter = MarkerSplitter(transitions(tokenizer, True), "text")
    ours = [(state, part) for state, part, _ in splitter.feed(text, last=True) if part]
    assert ours == [(names[state], part) for state, part in theirs if part]


@given(
    text=st.text("<think>/ab \n", max_size=40),
    places=st.lists(st.integers(0, 40), max_size=10),
    stop=st.lists(st.text("ab <", min_size=1, max_size=3), max_size=2),
)
def test_the_cuts_change_nothing_and_characters_keep_their_tokens(text, places, stop) -> None:
    tokens = cut(text, places)
    whole, once = read(writer(), [text], stop=stop)
    pieces, often = read(writer(), tokens, stop=stop)
    assert plain(pieces) == plain(whole)
    assert often.stopped_by == once.stopped_by
    for piece in pieces:
        if isinstance(piece, Text):
            assert sum(length for length, _ in piece.runs) == len(piece.text)
            at = 0
            for length, token in piece.runs:
                assert piece.text[at : at + length] in tokens[token]
                at += length
    if often.stopped_at is not None:
        assert often.stopped_by in "".join(tokens[: often.stopped_at])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "weather"</tool_call>',
        "<tool_call>[1, 2]</tool_call>",
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>',
        "<tool_call></tool_call>",
        f"<tool_call>{'[' * 100_000}</tool_call>",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    pieces, channels = read(writer("json_tools"), [text])
    assert plain(pieces) == [("Text", text)]
    assert not channels.called


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_call_that_the_limit_cuts_off_is_text(name: str) -> None:
    tokenizer = writer(name)
    text = WRITTEN[name][:-3]
    splitter = MarkerSplitter(transitions(tokenizer, True), "text")
    channels = Channels(Letters(), splitter, read_calls=reader(tokenizer, TOOLS))
    pieces: Any = channels.feed([text]) + channels.finish(False)
    assert "".join(piece.text for piece in pieces) == text
    assert not channels.called
