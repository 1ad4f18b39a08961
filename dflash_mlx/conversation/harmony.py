"""The "harmony" format of gpt-oss answers: messages with a header each, told apart as they stream.

    <|start|>ROLE [to=RECIPIENT]<|channel|>CHANNEL [to=RECIPIENT] [<|constrain|>TYPE]<|message|>TEXT

`<|end|>`, `<|call|>` or `<|return|>` ends a message. An answer begins where the prompt stops,
mostly behind the role. Source: https://cookbook.openai.com/articles/openai-harmony.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.stop_strings import beginning_of

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_HEADER_MARKERS = (_START, _CHANNEL, _CONSTRAIN)
_MARKERS = (*_HEADER_MARKERS, _MESSAGE, "<|end|>", "<|call|>", "<|return|>")
_FIELD = re.compile(r"(?:<\|(start|channel|constrain)\|>\s*)?(to=)?([^\s<]+)")
# What a header can still become: a role with recipients, and all else behind a marker.
_HEADER = re.compile(
    r"(<\|start\|>\s*\S*)?(\s+to=\S*)*(\s+(t(o(=\S*)?)?)?)?(<\|(channel|constrain)\|>[^\n]*)?"
)
_NAMED = re.compile(r"to=|<\|(channel|constrain)\|>")
_ROLE_OR_MARKER = re.compile(r"<\|start\|>\s*[^\s<]*\s?|<\|(channel|constrain)\|>")
# Longer ones are no headers, only text that looks like the beginning of one.
_LONGEST_HEADER = 300


@dataclass(frozen=True)
class Header:
    """What a message says about itself.

    Attributes:
        role: who speaks: "assistant", or a tool's name.
        channel: "analysis" (thinking), "commentary" (tool calls) or "final"; None if it has none.
        recipient: who is spoken to, like "functions.get_weather"; None for the user.
        content_type: like "json", as the text of a call is constrained to; None if it does not say.
        number: which message of the answer it is, from 0.
    """

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    number: int = 0

    @property
    def for_the_reader(self) -> bool:
        """Whether the text is an answer to the user, neither thinking nor a call."""
        return self.channel not in ("analysis", "commentary") and self.recipient is None


def speaks_harmony(tokenizer: TokenizerWrapper) -> bool:
    """Whether a model's tokenizer has the tokens of such headers."""
    vocabulary = tokenizer.get_vocab()
    return all(marker in vocabulary for marker in (_START, _CHANNEL, _MESSAGE))


def speaks_only_harmony(tokenizer: TokenizerWrapper) -> bool:
    """Whether a model's answers are harmony messages, as those of gpt-oss."""
    return not tokenizer.has_thinking and speaks_harmony(tokenizer)


def parse_header(text: str, before: Header) -> Header:
    """The header that is written in a text, up to its `<|message|>`.

    Without a `<|start|>` it belongs to the speaker of the header before.
    """
    header = Header(number=before.number)
    if not text.lstrip().startswith(_START):
        header = replace(header, role=before.role)
    for marker, to, word in _FIELD.findall(text):
        if to:
            header = replace(header, recipient=word)
        elif marker == "start":
            header = replace(header, role=word)
        elif marker == "channel":
            header = replace(header, channel=word)
        else:
            header = replace(header, content_type=word)
    return header


class Messages:
    """Splits a streamed answer: `feed` gives (text, header) pieces, and no marker ever.

    A header is never shown, be it cut short, misplaced or doubled. What stands where a header could
    stand, but is none, is text.
    """

    def __init__(self, header: Header | None = None, opened: str | None = None):
        """Begin in the text of a message, or in a header of which `opened` is there already."""
        self.header = header or Header()
        self._opened = opened
        self._held = ""
        self._next = 0 if header is None else 1

    @classmethod
    def after(cls, tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> "Messages":
        """An answer to a prompt (token ids), which may end in a header or in a message's text."""
        vocabulary = tokenizer.get_vocab()
        start, message = vocabulary[_START], vocabulary[_MESSAGE]
        found = [i for i, token in enumerate(prompt) if token == start]
        if not found:
            return cls()
        last = list(prompt[found[-1] :])
        if message not in last:
            opened = tokenizer.decode(last)
            # A prompt that ends with the role has all of it, so what follows is no part of it.
            return cls(opened=opened if _NAMED.search(opened) else opened + " ")
        header = tokenizer.decode(last[: last.index(message)])
        return cls(parse_header(header, Header()))

    def feed(self, text: str) -> Iterator[tuple[str, Header]]:
        """The pieces that are certain now; what may belong to a marker or a header waits."""
        self._held += text
        while True:
            at, marker = _first_marker(self._held)
            if marker is None:
                break
            yield from self._say(self._held[:at])
            self._held = self._held[at + len(marker) :]
            self._obey(marker)
        ready = len(self._held) - beginning_of(_MARKERS, self._held)
        yield from self._say(self._held[:ready])
        self._held = self._held[ready:]

    def finish(self) -> Iterator[tuple[str, Header]]:
        """What still waits, when no more text comes; a header without its end is dropped."""
        yield from self._say(self._held)
        self._held = ""
        if self._opened is not None and not _NAMED.search(self._opened):
            yield from self._release()
        self._opened = None

    def _say(self, text: str) -> Iterator[tuple[str, Header]]:
        if not text:
            return
        if self._opened is None:
            yield text, self.header
            return
        self._opened += text
        if len(self._opened) > _LONGEST_HEADER or not _HEADER.fullmatch(self._opened):
            yield from self._release()

    def _release(self) -> Iterator[tuple[str, Header]]:
        """What looked like a header was text."""
        text, self._opened = _ROLE_OR_MARKER.sub("", self._opened or ""), None
        self._next = max(self._next, 1)
        if text:
            yield text, self.header

    def _obey(self, marker: str) -> None:
        if marker == _MESSAGE:
            if self._opened is not None:
                header = parse_header(self._opened, self.header)
                self.header = replace(header, number=self._next)
                self._next += 1
            self._opened = None
        elif marker not in _HEADER_MARKERS:
            self._opened = None
        elif marker == _START or self._opened is None:
            self._opened = marker
        else:
            self._opened += marker


def _first_marker(text: str) -> tuple[int, str | None]:
    return min(((text.find(m), m) for m in _MARKERS if m in text), default=(0, None))
