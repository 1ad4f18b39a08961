"""Cutting an answer, as it streams, where its markers are."""

from collections.abc import Iterator
from typing import Protocol

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.conversation.harmony import Header, Messages, speaks_only_harmony
from dflash_mlx.server.formats import (
    HEADER,
    TEXT,
    THINKING,
    TOOL,
    Transitions,
    transitions,
)
from dflash_mlx.stop_strings import beginning_of

# A state, text in it, and None; or a state that ends, no text, and the marker that ended it.
Cut = tuple[str, str, str | None]


class Splitter(Protocol):
    """Tells the parts of an answer apart.

    Attributes:
        state: what the answer is in, see `formats`.
    """

    state: str

    def feed(self, text: str, *, last: bool = False) -> Iterator[Cut]:
        """The parts that are certain when this much more is there; with `last`, what waits too."""
        ...


def splitter(tokenizer: TokenizerWrapper, prompt: list[int], state: str, tools: bool) -> Splitter:
    """For the answer to a prompt, which begins in a state.

    Without `tools`, what looks like a call is text as any other.
    """
    if speaks_only_harmony(tokenizer):
        return HarmonySplitter(Messages.after(tokenizer, prompt))
    return MarkerSplitter(transitions(tokenizer, tools), state)


class MarkerSplitter:
    """Follows a table of markers."""

    def __init__(self, transitions: Transitions, state: str):
        self._transitions, self.state = transitions, state
        self._held = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[Cut]:
        self._held += text
        while True:
            edges = self._transitions[self.state]
            found = [(self._held.find(m), -len(m), m, to) for m, to in edges if m in self._held]
            if not found:
                break
            at, _, marker, to = min(found)
            if at:
                yield self.state, self._held[:at], None
            self._held = self._held[at + len(marker) :]
            ended, self.state = self.state, to
            yield ended, "", marker
        ready = len(self._held)
        if not last:
            ready -= beginning_of([marker for marker, _ in edges], self._held)
        if ready:
            text, self._held = self._held[:ready], self._held[ready:]
            yield self.state, text, None


class HarmonySplitter:
    """Follows the headers of harmony messages; a state `tool:NAME` for calls of each function.

    Its parts do not say how many characters of markers stood between them, so a part counts as the
    last token's where one was held back.
    """

    def __init__(self, messages: Messages):
        self._messages = messages
        self._number, self.state = -1, HEADER

    def feed(self, text: str, *, last: bool = False) -> Iterator[Cut]:
        for said, header in self._messages.feed(text):
            yield from self._enter(header)
            yield self.state, said, None
        if last:
            for said, header in self._messages.finish():
                yield from self._enter(header)
                yield self.state, said, None

    def _enter(self, header: Header) -> Iterator[Cut]:
        if header.number == self._number:
            return
        self._number = header.number
        ended, self.state = self.state, _state(header)
        yield ended, "", ""


def _state(header: Header) -> str:
    if header.recipient is not None:
        return f"{TOOL}:{header.recipient.removeprefix('functions.')}"
    return TEXT if header.for_the_reader else THINKING
