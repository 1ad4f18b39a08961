"""gpt-oss answers: any header is parsed, and no marker reaches a conversation."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import AddedToken, Tokenizer

import dflash_mlx
from dflash_mlx.conversation import Template
from dflash_mlx.conversation.conversation import Conversation
from dflash_mlx.conversation.harmony import Header, Messages, parse_header, speaks_harmony
from dflash_mlx.conversation.thinking import markers, parts_of_answer
from dflash_mlx.server.formats import thinking_ends
from tests.tiny_pair import vocabulary, write_pair, write_tokenizer

MARKERS = ["start", "end", "message", "channel", "constrain", "return", "call"]
OPENED = "<|start|>assistant "

words = st.text("abz.{}: <|\n", max_size=12)
channels = st.sampled_from(["analysis", "commentary", "final", "odd"])
recipients = st.sampled_from([None, "functions.get_weather", "browser.search", "python"])
types = st.sampled_from([None, "json", "code"])


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, Header, str]:
    """A message as a model may write it: its text with header, the header, what it says."""
    channel, recipient, kind = draw(channels), draw(recipients), draw(types)
    before = draw(st.booleans())
    to = "" if recipient is None else f" to={recipient}"
    constrained = f" <|constrain|>{kind}" if draw(st.booleans()) else f" {kind}"
    header = (to if before else "") + f"<|channel|>{channel}" + ("" if before else to)
    header += constrained if kind else draw(st.sampled_from(["", " "]))
    said = draw(words)
    ending = draw(st.sampled_from(["<|end|>", "<|call|>", "<|return|>", ""]))
    return f"{header}<|message|>{said}{ending}", Header("assistant", channel, recipient, kind), said


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


def split(parts: Messages, pieces: list[str]) -> list[tuple[str, Header]]:
    """Consecutive pieces of one message joined."""
    joined: list[tuple[str, Header]] = []
    for piece in [*pieces, None]:
        for said, header in parts.finish() if piece is None else parts.feed(piece):
            if joined and joined[-1][1] == header:
                joined[-1] = (joined[-1][0] + said, header)
            else:
                joined.append((said, header))
    return joined


@settings(max_examples=300, deadline=None)
@given(st.lists(messages(), min_size=1, max_size=4), st.lists(st.integers(0, 9), max_size=30))
def test_every_header_is_parsed_however_the_text_is_cut(answer, sizes) -> None:
    text = "<|start|>assistant".join(written for written, _, _ in answer)
    got = split(Messages(opened=OPENED), cut(text, sizes))
    expected = [
        (said, Header(h.role, h.channel, h.recipient, h.content_type, number))
        for number, (_, h, said) in enumerate(answer)
        if said
    ]
    assert got == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(words, st.sampled_from([f"<|{m}|>" for m in MARKERS] + [" to=x", "final"])),
        max_size=12,
    ),
    st.lists(st.integers(0, 9), max_size=30),
)
def test_no_marker_is_ever_shown_and_cuts_do_not_matter(parts, sizes) -> None:
    text = "".join(parts)
    got = split(Messages(opened=OPENED), cut(text, sizes))
    assert got == split(Messages(opened=OPENED), [text])
    for said, _ in got:
        assert not any(f"<|{marker}|>" in said for marker in MARKERS if f"<|{marker}|>" in text)


@pytest.mark.parametrize(
    ("opened", "text", "expected"),
    [
        # Something else than a header where one could stand is text, and is not held back.
        (OPENED, "Hello <b>", [("Hello <b>", None)]),
        (OPENED, "to be or not", [("to be or not", None)]),
        (OPENED, "t", [("t", None)]),
        (OPENED, " two words", [(" two words", None)]),
        # A header that is cut short says nothing.
        (OPENED, "<|channel|>final", []),
        (OPENED, " to=functions.get", []),
        (OPENED, "<|channel|>final <|constr", []),
        (OPENED, "<|channel|>analysis<|message|>hm<|end|><|start|>assi", [("hm", "analysis")]),
        # The next header comes without an end before it, or without a role.
        (
            OPENED,
            "<|channel|>analysis<|message|>hm<|channel|>final<|message|>yes",
            [("hm", "analysis"), ("yes", "final")],
        ),
        # A lonely <|message|>, and an answer that begins in a message's text.
        (OPENED, "<|message|>yes", [("yes", None)]),
        (None, "yes<|return|>", [("yes", None)]),
    ],
)
def test_odd_answers(opened: str | None, text: str, expected: list) -> None:
    for size in (1, 3, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        got = split(Messages(opened=opened), pieces)
        assert [(said, header.channel) for said, header in got] == expected


def test_text_that_is_no_header_comes_at_once() -> None:
    parts = Messages(opened=OPENED)
    assert [said for said, _ in parts.feed("Hel")] == ["Hel"]
    assert [said for said, _ in parts.feed("lo")] == ["lo"]


def test_headers_of_tools() -> None:
    header = parse_header("<|start|>functions.now to=assistant<|channel|>commentary", Header())
    assert header == Header("functions.now", "commentary", "assistant")
    assert not Header("assistant", "commentary", "functions.now").for_the_reader
    assert Header("assistant", "final", None, "json").for_the_reader


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and '<|channel|>' in m.content %}"
    "{{ raise_exception('pass only the final part') }}{% endif %}"
    "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def harmony_tokenizer(folder: Path):
    # Without tokens for thinking, as Harmony's.
    write_tokenizer(folder, [word for word in vocabulary("") if "think" not in word])
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken(f"<|{m}|>", special=True) for m in MARKERS])
    tokenizer.save(str(file))
    loaded = load_tokenizer(folder)
    loaded.chat_template = TEMPLATE
    return loaded


def test_an_answer_begins_where_the_prompt_stops(tmp_path: Path) -> None:
    tokenizer = harmony_tokenizer(tmp_path)
    assert speaks_harmony(tokenizer)

    def answer(prompt: str, text: str) -> list[tuple[str, str | None]]:
        parts = Messages.after(tokenizer, tokenizer.encode(prompt, add_special_tokens=False))
        return [(said, header.channel) for said, header in split(parts, [text])]

    before = "<|start|>user<|message|>x<|end|>"
    assert answer(before + "<|start|>assistant", "<|channel|>final<|message|>y") == [("y", "final")]
    assert answer(before + "<|start|>assistant", "y") == [("y", None)]
    assert answer(before + "<|start|>assistant<|channel|>final<|message|>So", " y") == [
        (" y", "final")
    ]
    assert answer(before + "<|start|>assistant<|channel|>analysis", "<|message|>hm") == [
        ("hm", "analysis")
    ]
    assert answer("no header", "y<|end|>") == [("y", None)]


def test_the_headers_of_a_final_text_end_the_thinking(tmp_path: Path) -> None:
    """A grammar for the text begins behind any of them."""
    tokenizer = harmony_tokenizer(tmp_path)
    ends = thinking_ends(tokenizer, "text")
    for typed in ("", " ", " <|constrain|>json", "<|constrain|>json"):
        written = (
            f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final{typed}"
        )
        tokens = tokenizer.encode(f"{written}<|message|>", add_special_tokens=False)
        assert any(tuple(tokens[-len(end) :]) == end for end in ends), typed


def test_a_conversation_goes_on_after_any_header(tmp_path: Path, monkeypatch) -> None:
    target, draft = write_pair(tmp_path)
    model, _ = dflash_mlx.load(target, draft)
    (tmp_path / "harmony").mkdir()
    tokenizer = harmony_tokenizer(tmp_path / "harmony")
    conversation = Conversation(model, Template(tokenizer))
    for said in (
        "<|channel|>final <|constrain|>json<|message|>{}",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        "<|channel|><|channel|>final<|message|>a<|message|>b<|constrain|>",
    ):

        def written(*_, said=said, **__):
            yield from (_Response(character) for character in said)

        monkeypatch.setattr("dflash_mlx.conversation.conversation.stream_generate", written)
        list(conversation.ask("Well?"))
        assert "<|" not in str(conversation.messages)
    contents = [m["content"] for m in conversation.messages[1::2]]
    assert contents == ["{}", "", "", "ab"]
    assert conversation.messages[3]["reasoning_content"] == "hm"


class _Response:
    """As much of a response as a conversation looks at."""

    def __init__(self, text: str):
        self.text = text
        self.generation_tokens, self.generation_tps, self.prompt_tps = 1, 1.0, 1.0
        self.prompt_tokens, self.finish_reason, self.peak_memory = 1, None, 0.0
        self.target_forwards = self.proposed = self.accepted = self.copies = self.copied = 0
        self.acceptance_length = self.verify_length = self.plain_share = 0.0
        self.drafting_off = None


def test_structural_markers_of_a_tokenizer_are_left_out_too() -> None:
    class Kimi:
        has_thinking, think_start, think_end = True, "<|open|>think<|sep|>", "<|close|>think<|sep|>"
        structural_markers = ("<|open|>response<|sep|>", "<|close|>response<|sep|>")

        def rfind_think_start(self, tokens):
            return -1

        rfind_think_end = rfind_think_start

    assert set(markers(Kimi())) >= {"<|open|>response<|sep|>", "<|close|>think<|sep|>"}  # type: ignore[arg-type]
    parts = parts_of_answer(Kimi(), [])  # type: ignore[arg-type]
    text = "<|open|>think<|sep|>hm<|close|>think<|sep|><|open|>response<|sep|>yes"
    got = [*parts.feed(text + "<|close|>response<|sep|>"), *parts.finish()]
    assert got == [("hm", True), ("yes", False)]
