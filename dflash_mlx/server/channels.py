"""From tokens to what they are: thinking, tool calls, and the text that is meant for the reader."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_mlx.server.calls import Call
from dflash_mlx.server.formats import HEADER, TEXT, THINKING, TOOL, called
from dflash_mlx.server.splitting import Splitter
from dflash_mlx.stop_strings import StopStrings
from dflash_mlx.tokens import add_token

log = logging.getLogger("dflash_mlx.server")

# How many characters come from which token of the answer, counted from 0.
Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Thinking:
    """A piece of what the model thinks."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer; `runs` says which tokens its characters come from."""

    text: str
    runs: Runs


Piece = Thinking | Text | Call


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces with neighbours of one kind as one."""
    whole: list[Piece] = []
    for piece in pieces:
        last = whole[-1] if whole else None
        if isinstance(piece, Text) and isinstance(last, Text):
            whole[-1] = Text(last.text + piece.text, last.runs + piece.runs)
        elif isinstance(piece, Thinking) and isinstance(last, Thinking):
            whole[-1] = Thinking(last.text + piece.text)
        else:
            whole.append(piece)
    return whole


class Origins:
    """Which token each character of a text comes from, taken off at the front."""

    def __init__(self) -> None:
        self._runs: deque[tuple[int, int]] = deque()

    def add(self, runs: Runs) -> None:
        """The text goes on with these."""
        self._runs.extend(run for run in runs if run[0])

    def take(self, length: int) -> Runs:
        """Take so many characters off."""
        taken: Runs = []
        while length and self._runs:
            n, token = self._runs.popleft()
            if n > length:
                self._runs.appendleft((n - length, token))
                n = length
            taken.append((n, token))
            length -= n
        return taken


class Channels:
    """Turns an answer's tokens into pieces, as they come.

    Line breaks around thinking and calls are left out, and so is other white space before them.

    Attributes:
        stopped_by: the stop string that ended the text.
        stopped_at: how many tokens the answer has up to the end of that string, or of the only
            call that is wanted.
        called: whether there was a tool call.
        thinking_tokens: tokens that began inside the thinking.
    """

    def __init__(
        self,
        detokenizer: Any,
        splitter: Splitter,
        *,
        begun: str = "",
        read_calls: Callable[[str, str], list[Call]] | None = None,
        stop: Sequence[str] = (),
        one_call: bool = False,
    ):
        """Begin an answer.

        Args:
            detokenizer: mlx_lm's, fresh.
            splitter: tells the parts of this model's answers apart.
            begun: text of the answer that the prompt already holds.
            read_calls: see `calls.reader`; None where no calls are wanted.
            stop: strings that end the text.
            one_call: end the answer behind its first call.
        """
        self._detokenizer = detokenizer
        self._splitter = splitter
        self._read_calls, self._one_call = read_calls, one_call
        self._strings = tuple(stop)
        self._stop = StopStrings(stop)
        # Origins of what waits in the splitter, in the stop strings, and as white space.
        self._split, self._unstopped, self._shown = Origins(), Origins(), Origins()
        self._thought, self._spaces = _Trimmed(), ""
        self._behind_part = splitter.state == THINKING
        self._call, self._opened = "", ""
        self._count = 0
        self.stopped_by: str | None = None
        self.stopped_at: int | None = None
        self.called = False
        self.thinking_tokens = 0
        self._split.add([(len(begun), 0)])
        self._begun = list(self._pieces(begun))

    def feed(self, tokens: Iterable[int]) -> list[Piece]:
        """The pieces that are certain after some more tokens; an end token is not fed."""
        pieces, self._begun = self._begun, []
        for token in tokens:
            if self.stopped_at is not None:
                break
            self.thinking_tokens += self._splitter.state == THINKING
            add_token(self._detokenizer, token)
            text = self._detokenizer.last_segment
            self._split.add([(len(text), self._count)])
            self._count += 1
            pieces += self._pieces(text)
        return pieces

    def finish(self, complete: bool) -> list[Piece]:
        """What still waits; `complete` if the model ended the answer itself."""
        pieces, self._begun = self._begun, []
        if self.stopped_at is None:
            self._detokenizer.finalize()
            text = self._detokenizer.last_segment
            self._split.add([(len(text), max(self._count - 1, 0))])
            pieces += self._pieces(text, last=True)
        if self.stopped_at is None:
            if self._splitter.state.startswith(TOOL):
                pieces += self._close_call(self._splitter.state, "", complete)
            pieces += self._answer("", [], last=True)
        if self._spaces and not self.called:
            pieces.append(Text(self._spaces, self._shown.take(len(self._spaces))))
        return pieces

    def _pieces(self, text: str, last: bool = False) -> Iterator[Piece]:
        for state, part, marker in self._splitter.feed(text, last=last):
            if self.stopped_at is not None:
                return
            runs = self._split.take(len(part) + len(marker or ""))
            if marker is not None:
                yield from self._switch(state, marker, runs)
            elif state == TEXT:
                yield from self._answer(part, runs)
            elif state == THINKING:
                if thought := self._thought.feed(part):
                    yield Thinking(thought)
            elif state.startswith(TOOL):
                self._call += part

    def _switch(self, ended: str, marker: str, runs: Runs) -> Iterator[Piece]:
        state = self._splitter.state
        if ended.startswith(TOOL):
            yield from self._close_call(ended, marker, True)
            if self.called and self._one_call:
                self.stopped_at = runs[-1][1] + 1 if runs else self._count
        elif ended == TEXT and state != TEXT:
            # A stop string cannot go on behind a call or a thought.
            yield from self._answer("", [], last=True)
        if state.startswith(TOOL):
            self._opened, self._call = marker, ""
        elif state == THINKING:
            self._thought = _Trimmed()
        if ended not in (TEXT, HEADER):
            self._behind_part = True

    def _answer(self, text: str, runs: Runs, *, last: bool = False) -> Iterator[Piece]:
        self._unstopped.add(runs)
        text = self._stop.feed(text, last=last)
        self._shown.add(self._unstopped.take(len(text)))
        if self._stop.found is not None:
            self.stopped_by = self._stop.found
            end = self._unstopped.take(len(self.stopped_by))
            self.stopped_at = end[-1][1] + 1 if end else self._count
        elif last:
            self._stop = StopStrings(self._strings)
        if self._behind_part:
            self._shown.take(len(self._spaces))
            kept = text.lstrip("\n")
            self._shown.take(len(text) - len(kept))
            text, self._spaces, self._behind_part = kept, "", not kept
        text = self._spaces + text
        solid = len(text.rstrip())
        self._spaces = text[solid:]
        if solid:
            yield Text(text[:solid], self._shown.take(solid))

    def _close_call(self, state: str, end: str, complete: bool) -> Iterator[Piece]:
        text, self._call = self._call, ""
        calls = self._read_calls(state, text) if self._read_calls and complete else []
        if calls:
            self.called = True
            yield from calls[:1] if self._one_call else calls
            return
        log.warning("A malformed tool call was passed on as text: %r", text[:200])
        plain = text if called(state) else self._opened + text + end
        if plain:
            yield Text(self._spaces + plain, self._shown.take(len(self._spaces)))
            self._spaces, self._behind_part = "", False


class _Trimmed:
    """Leaves out the line breaks around a streamed text."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def feed(self, text: str) -> str:
        text = self._held + text
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        solid = len(text.rstrip("\n"))
        self._held = text[solid:]
        return text[:solid]
